//! The listener of listener.c in Rust, without crates: the same words, the same lines, fewer styles.
//!
//!     listener --style blocking|poll [--deny GLOB=ERRNO] [--mark FLAGS MASK PATH]... DIRECTORY
//!
//! GLOB is `*` and an ending here.

use std::ffi::CString;
use std::fs::File;
use std::io::{Error, Write};
use std::os::raw::{c_char, c_int, c_short, c_uint, c_ulong, c_void};
use std::os::unix::fs::FileExt;
use std::os::unix::io::FromRawFd;

extern "C" {
    fn fanotify_init(flags: c_uint, event_f_flags: c_uint) -> c_int;
    fn fanotify_mark(group: c_int, flags: c_uint, mask: u64, dirfd: c_int, path: *const c_char) -> c_int;
    fn read(fd: c_int, buffer: *mut c_void, size: usize) -> isize;
    fn write(fd: c_int, buffer: *const c_void, size: usize) -> isize;
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
    fn lseek(fd: c_int, offset: i64, whence: c_int) -> i64;
}

#[repr(C)]
struct PollFd {
    fd: c_int,
    events: c_short,
    revents: c_short,
}

const PRE_CONTENT: c_uint = 0x8;
const NONBLOCK: c_uint = 0x2;
const CLOEXEC: c_uint = 0x1;
const READ_WRITE: c_uint = 0o2;
const ADD: u64 = 0x1;
const PRE_ACCESS: u64 = 0x0010_0000;
const WORDS: [(&str, u64); 5] = [
    ("add", ADD),
    ("mount", 0x10),
    ("PRE_ACCESS", PRE_ACCESS),
    ("OPEN_PERM", 0x0001_0000),
    ("ACCESS_PERM", 0x0002_0000),
];
const ERRNOS: [(&str, u32); 3] = [("EPERM", 1), ("EIO", 5), ("ENOSPC", 28)];
const ALLOW: u32 = 1;
const DENY: u32 = 2;
const RANGE: u8 = 6;
const PAGE: u64 = 4096;
const SEEK_DATA: c_int = 3;
const POLLIN: c_short = 1;
const AT_FDCWD: c_int = -100;
const EINTR: i32 = 4;
const EAGAIN: i32 = 11;

struct Denial {
    ending: String,
    word: String,
    errno: u32,
}

fn die(what: &str) -> ! {
    eprintln!("listener: {}: {}", what, Error::last_os_error());
    std::process::exit(1)
}

fn say(line: String) {
    let mut output = std::io::stdout();
    output
        .write_all(format!("{}\n", line).as_bytes())
        .and_then(|_| output.flush())
        .expect("stdout");
}

fn value_of(text: &str) -> u64 {
    text.split('|')
        .map(|word| WORDS.iter().find(|(name, _)| *name == word).unwrap_or_else(|| die(word)).1)
        .fold(0, |all, bit| all | bit)
}

fn mark(group: c_int, flags: u64, mask: u64, path: &str) -> bool {
    let path = CString::new(path).expect("a path");
    unsafe { fanotify_mark(group, flags as c_uint, mask, AT_FDCWD, path.as_ptr()) == 0 }
}

fn u16_at(bytes: &[u8], place: usize) -> usize {
    u16::from_ne_bytes(bytes[place..place + 2].try_into().expect("2 bytes")) as usize
}

fn u64_at(bytes: &[u8], place: usize) -> u64 {
    u64::from_ne_bytes(bytes[place..place + 8].try_into().expect("8 bytes"))
}

/// The offset and count of an event that has a range.
fn range_of(event: &[u8]) -> Option<(u64, u64)> {
    let mut place = u16_at(event, 6);
    while place + 4 <= event.len() {
        if event[place] == RANGE {
            return Some((u64_at(event, place + 8), u64_at(event, place + 16)));
        }
        place += u16_at(event, place + 2).max(4);
    }
    None
}

/// Every page of the range that is a hole gets its content.
fn fill(fd: c_int, file: &File, offset: u64, count: u64) {
    let size = file.metadata().expect("fstat").len();
    let mut place = offset;
    while place < offset + count && place < size {
        if unsafe { lseek(fd, place as i64, SEEK_DATA) } != place as i64 {
            let end = size.min(place + PAGE);
            let content: Vec<u8> = (place..end).map(|at| (at % 251 + at / PAGE % 5) as u8).collect();
            file.write_all_at(&content, place).expect("pwrite");
        }
        place += PAGE;
    }
}

fn handle(group: c_int, event: &[u8], denial: &Option<Denial>) {
    let mask = u64_at(event, 8);
    let fd = i32::from_ne_bytes(event[16..20].try_into().expect("4 bytes"));
    let file = unsafe { File::from_raw_fd(fd) }; // closes it, after the answer
    let path = std::fs::read_link(format!("/proc/self/fd/{}", fd)).expect("readlink");
    let name = path.file_name().expect("a name").to_string_lossy().into_owned();
    let range = range_of(event);
    let place = range.map_or("- -".to_string(), |(offset, count)| format!("{} {}", offset, count));
    let what: Vec<&str> = WORDS[2..]
        .iter()
        .filter(|(_, bit)| mask & bit != 0)
        .map(|(word, _)| *word)
        .collect();
    let refusal = denial.as_ref().filter(|rule| name.ends_with(&rule.ending));
    let decision = refusal.map_or("ALLOW".to_string(), |rule| format!("DENY {}", rule.word));
    say(format!("{} {} {} {}", what.join("|"), place, name, decision));
    if let (Some((offset, count)), None) = (range, refusal) {
        fill(fd, &file, offset, count);
    }
    let response = refusal.map_or(ALLOW, |rule| DENY | rule.errno << 24);
    let answer = [fd.to_ne_bytes(), response.to_ne_bytes()].concat();
    if unsafe { write(group, answer.as_ptr() as *const c_void, answer.len()) } != 8 {
        die("answer");
    }
    drop(file);
    if name == "end" {
        std::process::exit(0);
    }
}

fn serve(group: c_int, waits_in_poll: bool, denial: &Option<Denial>) {
    let mut buffer = vec![0u8; 4096];
    loop {
        let mut wanted = PollFd {
            fd: group,
            events: POLLIN,
            revents: 0,
        };
        if waits_in_poll && unsafe { poll(&mut wanted, 1, -1) } < 0 {
            die("poll");
        }
        let length = unsafe { read(group, buffer.as_mut_ptr() as *mut c_void, buffer.len()) };
        if length < 0 {
            match Error::last_os_error().raw_os_error() {
                Some(EINTR) | Some(EAGAIN) => continue,
                _ => die("read"),
            }
        }
        let mut events = &buffer[..length as usize];
        while !events.is_empty() {
            let size = u32::from_ne_bytes(events[..4].try_into().expect("4 bytes")) as usize;
            handle(group, &events[..size], denial);
            events = &events[size..];
        }
    }
}

fn main() {
    let mut style = "blocking".to_string();
    let mut directory = String::new();
    let mut denial = None;
    let mut marks = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut next = || words.next().unwrap_or_else(|| die("arguments"));
        match word.as_str() {
            "--style" => style = next(),
            "--mark" => marks.push([next(), next(), next()]),
            "--deny" => {
                let rule = next();
                let (glob, word) = rule.split_once('=').expect("GLOB=ERRNO");
                let errno = ERRNOS.iter().find(|(name, _)| *name == word).expect("an errno").1;
                let ending = glob.trim_start_matches('*').to_string();
                denial = Some(Denial {
                    ending,
                    word: word.to_string(),
                    errno,
                });
            }
            _ => directory = word,
        }
    }
    let waits_in_poll = style == "poll";
    let group = unsafe { fanotify_init(PRE_CONTENT | CLOEXEC | if waits_in_poll { NONBLOCK } else { 0 }, READ_WRITE) };
    if group < 0 {
        die("fanotify_init");
    }
    for [flags, mask, path] in marks {
        let done = mark(group, value_of(&flags), value_of(&mask), &path);
        let result = if done {
            "OK".to_string()
        } else {
            Error::last_os_error().to_string()
        };
        say(format!(
            "mark {} {} {}: {}",
            flags,
            mask,
            path.rsplit('/').next().unwrap_or(&path),
            result
        ));
    }
    if !mark(group, ADD, PRE_ACCESS, &format!("{}/end", directory)) {
        die("end");
    }
    say("ready".to_string());
    serve(group, waits_in_poll, &denial);
}
