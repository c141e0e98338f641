/* Signals that meet a read(2) which waits, in a process of one thread or of several. */
#define _GNU_SOURCE
#include "races.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define SIGNALS 1000
#define READS 500

/* Of the listener, in memory that its parent sees. */
static struct counts {
	atomic_int ready, handled, events, interrupted, failed;
} *counts;
static int group;

static void handle(int number)
{
	(void)number;
	counts->handled++;
}

static void handle_with_restart(int number)
{
	struct sigaction action = {.sa_handler = handle, .sa_flags = SA_RESTART};

	must(!sigaction(number, &action, NULL), "sigaction");
}

static void *read_for_ever(void *argument)
{
	char buffer[4096] __attribute__((aligned(8)));

	(void)argument;
	counts->ready++;
	for (;;) {
		ssize_t length = read(group, buffer, sizeof(buffer));
		if (length > 0) {
			/* Before the answer, after which it may be asked for. */
			counts->events += events_in(buffer, length);
			allow(group, buffer, length);
		} else if (length < 0 && errno == EINTR) {
			counts->interrupted++;
		} else {
			counts->failed++;
		}
	}
	return NULL;
}

static void listen_with(int threads)
{
	group = group_on_everything(0);
	handle_with_restart(SIGUSR1);
	handle_with_restart(SIGUSR2);
	for (int i = 1; i < threads; i++)
		start(read_for_ever, 0);
	read_for_ever(NULL);
}

static void read_stub(int times)
{
	read_often(path_in(places[0], "stub"), times);
}

static pid_t start_listener(void (*listen)(int), int threads)
{
	counts = shared_memory(sizeof(*counts));
	pid_t listener = start_child(-1, listen, threads);
	while (counts->ready < threads)
		usleep(1000);
	return listener;
}

static void end_listener(pid_t listener)
{
	must(!kill(listener, SIGKILL), "kill");
	must(waitpid(listener, NULL, 0) == listener, "waitpid");
}

/* Signals of the process and of its main thread by turns, while events come. */
void signals_restart(int threads)
{
	pid_t listener = start_listener(listen_with, threads);
	pid_t accessor = start_child(-1, read_stub, READS);
	unsigned int seed = threads;

	for (int i = 0; i < SIGNALS; i++) {
		if (i % 2)
			must(!kill(listener, SIGUSR1), "kill");
		else
			must(!syscall(SYS_tgkill, listener, listener, SIGUSR2), "tgkill");
		/* Some come together, and now and then there is none for a while. */
		usleep(rand_r(&seed) % (i % 100 ? 2000 : 20000));
	}
	wait_for(accessor);
	/* What was sent last may still be on its way. */
	read_stub(threads);
	say("%d events, %d failed, %s", counts->events, counts->failed, counts->handled ? "signals handled" : "no signal handled");
	say("interrupted %d", counts->interrupted);
	end_listener(listener);
}

/* The main thread of the listener cannot take the signal now; it is nobody else's. */
static void listen_while_vfork(int threads)
{
	group = group_on_everything(0);
	handle_with_restart(SIGUSR1);
	start(read_for_ever, 0);
	usleep(200000); /* for the read to be waiting; nobody tells */
	pid_t self = getpid(), child = vfork();
	if (!child) {
		kill(self, SIGUSR1);
		usleep(500000);
		_exit(0);
	}
	must(child > 0, "vfork");
	counts->ready++;
	for (;;)
		pause();
}

void signal_while_vfork(void)
{
	counts = shared_memory(sizeof(*counts));
	pid_t listener = start_child(-1, listen_while_vfork, 1);
	while (counts->ready < 2 || !counts->handled)
		usleep(1000);
	read_stub(1);
	say("%d events, %d failed, interrupted %d, handled %d", counts->events, counts->failed, counts->interrupted, counts->handled);
	end_listener(listener);
}

static void listen_beside(int threads)
{
	group = group_on_everything(0);
	for (int i = 0; i < threads; i++)
		start(read_for_ever, 0);
	for (;;)
		pause();
}

/* A process stops when each of its threads has. */
void stop_and_go_on(void)
{
	pid_t listener = start_listener(listen_beside, 2);

	for (int i = 0; i < 3; i++) {
		int status;
		read_stub(2);
		usleep(100000); /* for both reads to be waiting; nobody tells */
		must(!kill(listener, SIGSTOP), "kill");
		must(waitpid(listener, &status, WUNTRACED) == listener, "waitpid");
		say(WIFSTOPPED(status) ? "stopped" : "ended");
		must(!kill(listener, SIGCONT), "kill");
	}
	read_stub(2);
	say("%d events, %d failed, interrupted %d", counts->events, counts->failed, counts->interrupted);
	end_listener(listener);
}
