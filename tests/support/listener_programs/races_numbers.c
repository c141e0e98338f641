/* What races for descriptors, mappings and processes; and what a listener may do that has lost its rights. */
#define _GNU_SOURCE
#include "races.h"

#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define THREADS 4
#define MAPPINGS 1000 /* of each thread */
#define COPIES 300
#define GROUPS 300
#define RESERVED 64 /* descriptors that groups get under `fusehsm run`: the highest below 1024 */
#define NOBODY 65534

static void join_threads(void *(*body)(void *), intptr_t argument)
{
	pthread_t threads[THREADS];

	for (int i = 0; i < THREADS; i++)
		must(!pthread_create(&threads[i], NULL, body, (void *)argument), "pthread_create");
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
}

static atomic_int failed;

static void *map_often(void *argument)
{
	for (int i = 0; i < MAPPINGS; i++) {
		void *mapping = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, (intptr_t)argument, 0);
		if (mapping == MAP_FAILED)
			failed++;
		else
			munmap(mapping, 4096);
	}
	return NULL;
}

void mappings_in_threads(void)
{
	int file = open(path_in(places[0], "mapped"), O_RDONLY);

	must(file >= 0, "open");
	join_threads(map_often, file);
	say("%d mappings failed", failed);
}

/* dup(2) in one thread against close(2) of the group's only descriptor in another. */

static atomic_int original, copy, turn; /* `turn`: of the copy, when it is odd */

static void *copy_often(void *argument)
{
	unsigned int seed = 1;

	(void)argument;
	for (;;) {
		while (turn % 2 == 0)
			sched_yield();
		for (volatile int spin = rand_r(&seed) % 20000; spin > 0; spin--)
			;
		copy = dup(original);
		must(copy >= 0 || errno == EBADF, "dup");
		turn++;
	}
	return NULL;
}

void copies_against_closes(void)
{
	unsigned int seed = 2;
	int dead = 0;
	char buffer[4096];

	start(copy_often, 0);
	for (int i = 0; i < COPIES; i++) {
		original = group_on_everything(FAN_NONBLOCK);
		turn++;
		for (volatile int spin = rand_r(&seed) % 60000; spin > 0; spin--)
			;
		must(!close(original), "close");
		while (turn % 2)
			sched_yield();
		if (copy < 0)
			continue;
		usleep(1000); /* for what is about to end to have ended */
		dead += (fcntl(copy, F_GETFL) & O_ACCMODE) != O_RDWR || read(copy, buffer, sizeof(buffer)) >= 0 || errno != EAGAIN;
		must(!close(copy), "close");
	}
	say("%d copies were dead", dead);
}

/* All lower numbers are in use: files that are opened get some of those that groups get, too. */

static atomic_int opened, replaced, over;

static void *open_often(void *argument)
{
	unsigned int seed = pthread_self();

	(void)argument;
	while (!over) {
		struct stat found;
		int file = open("/etc/passwd", O_RDONLY);
		must(file >= 0, "open");
		usleep(rand_r(&seed) % 400);
		replaced += fstat(file, &found) || !S_ISREG(found.st_mode);
		opened++;
		must(!close(file), "close");
	}
	return NULL;
}

void numbers_in_use(void)
{
	struct rlimit limit;

	must(!getrlimit(RLIMIT_NOFILE, &limit), "getrlimit");
	int lowest = (limit.rlim_cur < 1024 ? limit.rlim_cur : 1024) - RESERVED;
	for (int file = 0; file < lowest - 1;)
		must((file = open("/dev/null", O_RDONLY)) >= 0, "open");
	for (int i = 1; i < THREADS; i++)
		start(open_often, 0);
	for (int i = 0; i < GROUPS || !opened; i++) {
		int group = fanotify_init(FAN_CLASS_PRE_CONTENT, O_RDONLY);
		must(group >= 0, "fanotify_init");
		must(!close(group), "close");
	}
	say("%d files replaced", replaced);
}

/* Readers until no more processes are allowed: each takes one of the supervisor's threads, which count, too. */
void processes_run_out(void)
{
	int group = group_on_everything(0), file = open(path_in(places[0], "mapped"), O_RDONLY);
	pid_t child = 0;

	for (int i = 0; i < 200 && child >= 0; i++) {
		child = fork();
		if (!child) {
			char buffer[4096] __attribute__((aligned(8)));
			ssize_t length;
			while ((length = read(group, buffer, sizeof(buffer))) > 0)
				allow(group, buffer, length);
			/* No thread was to be had for it to wait in. */
			_exit(errno != ENOMEM);
		}
		usleep(5000);
	}
	say(child < 0 ? "no more processes" : "200 processes");
	void *mapping = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, file, 0);
	say(mapping == MAP_FAILED ? "mmap failed" : "mapped");
	say("ready");
	for (;;)
		pause();
}

/* Rights */

static void say_result(const char *what, int result)
{
	say("%s: %s", what, result < 0 ? strerrorname_np(errno) : "OK");
}

static void become_nobody(void)
{
	must(!setgroups(0, NULL) && !setresgid(NOBODY, NOBODY, NOBODY) && !setresuid(NOBODY, NOBODY, NOBODY), "setresuid");
}

static void lose_sys_admin(void)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2];

	must(!syscall(SYS_capget, &header, data), "capget");
	data[CAP_TO_INDEX(CAP_SYS_ADMIN)].effective &= ~CAP_TO_MASK(CAP_SYS_ADMIN);
	must(!syscall(SYS_capset, &header, data), "capset");
}

static void init_as_nobody(int unused)
{
	become_nobody();
	say_result("as nobody", fanotify_init(FAN_CLASS_PRE_CONTENT, O_RDONLY));
}

static void init_without_sys_admin(int unused)
{
	lose_sys_admin();
	say_result("without CAP_SYS_ADMIN", fanotify_init(FAN_CLASS_PRE_CONTENT, O_RDONLY));
}

static void init_as_root(int unused)
{
	say_result("as root", fanotify_init(FAN_CLASS_PRE_CONTENT, O_RDONLY));
}

void rights_dropped(void)
{
	wait_for(start_child(-1, init_as_nobody, 0));
	wait_for(start_child(-1, init_without_sys_admin, 0));
	wait_for(start_child(-1, init_as_root, 0));
}

static void mark_all_kinds(int group)
{
	const char *stub = path_in(places[0], "stub");

	say_result("inode", fanotify_mark(group, FAN_MARK_ADD, FAN_PRE_ACCESS, AT_FDCWD, stub));
	say_result("mount", fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_PRE_ACCESS, AT_FDCWD, stub));
	say_result("filesystem", fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_FILESYSTEM, FAN_PRE_ACCESS, AT_FDCWD, stub));
	say_result("unreadable", fanotify_mark(group, FAN_MARK_ADD, FAN_PRE_ACCESS, AT_FDCWD, path_in(places[0], "whole")));
}

static void read_stub_once(int unused)
{
	read_often(path_in(places[0], "stub"), 1);
}

static void listen_as_nobody(int group)
{
	char buffer[4096] __attribute__((aligned(8)));

	become_nobody();
	mark_all_kinds(group);
	pid_t accessor = start_child(group, read_stub_once, 0);
	ssize_t length = read(group, buffer, sizeof(buffer));
	must(length > 0, "read");
	say("%d events", allow(group, buffer, length));
	wait_for(accessor);
}

static void mark_without_sys_admin(int group)
{
	lose_sys_admin();
	mark_all_kinds(group);
}

/* A group that somebody with rights has made, in the hands of those who have none. */
void rights_inherited(void)
{
	int group = fanotify_init(FAN_CLASS_PRE_CONTENT, O_RDONLY);

	must(group >= 0, "fanotify_init");
	must(!chmod(path_in(places[0], "whole"), 0600), "chmod");
	wait_for(start_child(-1, listen_as_nobody, group));
	wait_for(start_child(-1, mark_without_sys_admin, group));
}
