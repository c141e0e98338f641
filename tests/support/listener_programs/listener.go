// The listener of listener.c in Go: the same words, the same lines, fewer styles.
//
//	listener --style blocking|netpoll [--deny GLOB=ERRNO] [--mark FLAGS MASK PATH]... DIRECTORY
//
// "blocking": goroutines that read with system calls of their own, each holding a thread of the runtime. "netpoll": the runtime waits for the
// group with its own edge-triggered epoll(7), as for a socket.
package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"unsafe"
)

const (
	preContent = 0x8
	nonblock   = 0x2
	cloexec    = 0x1
	add        = 0x1
	mount      = 0x10
	openPerm   = 0x10000
	accessPerm = 0x20000
	preAccess  = 0x100000
	allow      = 1
	deny       = 2
	rangeType  = 6
	page       = 4096
	seekData   = 3
	atFdcwd    = -100
)

var (
	words  = map[string]uint64{"add": add, "mount": mount, "OPEN_PERM": openPerm, "ACCESS_PERM": accessPerm, "PRE_ACCESS": preAccess}
	errnos = map[string]syscall.Errno{"EPERM": syscall.EPERM, "EIO": syscall.EIO, "ENOSPC": syscall.ENOSPC}
	denied string
	denial string
)

func die(what string, err error) {
	fmt.Fprintf(os.Stderr, "listener: %s: %v\n", what, err)
	os.Exit(1)
}

func valueOf(text string) (value uint64) {
	for _, word := range strings.Split(text, "|") {
		bit, known := words[word]
		if !known {
			die(word, syscall.EINVAL)
		}
		value |= bit
	}
	return value
}

func markPath(group int, flags, mask uint64, path string) error {
	bytes, err := syscall.BytePtrFromString(path)
	if err != nil {
		return err
	}
	dirfd := atFdcwd
	_, _, failure := syscall.Syscall6(syscall.SYS_FANOTIFY_MARK, uintptr(group), uintptr(flags), uintptr(mask), uintptr(dirfd),
		uintptr(unsafe.Pointer(bytes)), 0)
	if failure != 0 {
		return failure
	}
	return nil
}

// The offset and count of an event that has a range.
func rangeOf(event []byte) (offset, count uint64, found bool) {
	for place := int(binary.LittleEndian.Uint16(event[6:])); place+4 <= len(event); {
		size := int(binary.LittleEndian.Uint16(event[place+2:]))
		if event[place] == rangeType {
			return binary.LittleEndian.Uint64(event[place+8:]), binary.LittleEndian.Uint64(event[place+16:]), true
		}
		if size == 0 {
			break
		}
		place += size
	}
	return 0, 0, false
}

// Every page of the range that is a hole gets its content.
func fill(fd int, offset, count uint64) {
	var stat syscall.Stat_t
	if err := syscall.Fstat(fd, &stat); err != nil {
		die("fstat", err)
	}
	for place := offset; place < offset+count && place < uint64(stat.Size); place += page {
		if data, err := syscall.Seek(fd, int64(place), seekData); err == nil && data == int64(place) {
			continue
		}
		size := uint64(stat.Size) - place
		if size > page {
			size = page
		}
		content := make([]byte, size)
		for i := range content {
			content[i] = byte((place+uint64(i))%251 + (place+uint64(i))/page%5)
		}
		if _, err := syscall.Pwrite(fd, content, int64(place)); err != nil {
			die("pwrite", err)
		}
	}
}

func handle(group int, event []byte) {
	mask := binary.LittleEndian.Uint64(event[8:])
	fd := int(int32(binary.LittleEndian.Uint32(event[16:])))
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		die("readlink", err)
	}
	name, where := filepath.Base(path), "- -"
	offset, count, ranged := rangeOf(event)
	if ranged {
		where = fmt.Sprintf("%d %d", offset, count)
	}
	var what []string
	for _, word := range []string{"PRE_ACCESS", "OPEN_PERM", "ACCESS_PERM"} {
		if mask&words[word] != 0 {
			what = append(what, word)
		}
	}
	decision, response := "ALLOW", uint32(allow)
	if matched, _ := filepath.Match(denied, name); matched {
		decision, response = "DENY "+denial, deny|uint32(errnos[denial])<<24
	}
	fmt.Printf("%s %s %s %s\n", strings.Join(what, "|"), where, name, decision)
	if ranged && response == allow {
		fill(fd, offset, count)
	}
	answer := make([]byte, 8)
	binary.LittleEndian.PutUint32(answer, uint32(fd))
	binary.LittleEndian.PutUint32(answer[4:], response)
	if _, err := syscall.Write(group, answer); err != nil {
		die("answer", err)
	}
	syscall.Close(fd)
	if name == "end" {
		os.Exit(0)
	}
}

func serve(group int, read func([]byte) (int, error)) {
	buffer := make([]byte, 4096)
	for {
		length, err := read(buffer)
		if err == syscall.EINTR { // the runtime sends itself signals
			continue
		}
		if err != nil {
			die("read", err)
		}
		for events := buffer[:length]; len(events) > 0; {
			size := binary.LittleEndian.Uint32(events)
			handle(group, events[:size])
			events = events[size:]
		}
	}
}

func main() {
	style, directory := "blocking", ""
	var marks [][]string
	for words := os.Args[1:]; len(words) > 0; {
		switch words[0] {
		case "--style":
			style, words = words[1], words[2:]
		case "--deny":
			rule := strings.SplitN(words[1], "=", 2)
			denied, denial, words = rule[0], rule[1], words[2:]
		case "--mark":
			marks, words = append(marks, words[1:4]), words[4:]
		default:
			directory, words = words[0], words[1:]
		}
	}
	flags := uintptr(preContent | cloexec)
	if style == "netpoll" {
		flags |= nonblock
	}
	number, _, failure := syscall.Syscall(syscall.SYS_FANOTIFY_INIT, flags, syscall.O_RDWR, 0)
	if failure != 0 {
		die("fanotify_init", failure)
	}
	group := int(number)
	for _, mark := range marks {
		result := "OK"
		if err := markPath(group, valueOf(mark[0]), valueOf(mark[1]), mark[2]); err != nil {
			result = err.Error()
		}
		fmt.Printf("mark %s %s %s: %s\n", mark[0], mark[1], filepath.Base(mark[2]), result)
	}
	if err := markPath(group, add, preAccess, directory+"/end"); err != nil {
		die("end", err)
	}
	fmt.Println("ready")
	if style == "netpoll" {
		file := os.NewFile(number, "fanotify")
		serve(group, file.Read)
	}
	for i := 0; i < 3; i++ {
		go serve(group, func(buffer []byte) (int, error) { return syscall.Read(group, buffer) })
	}
	serve(group, func(buffer []byte) (int, error) { return syscall.Read(group, buffer) })
}
