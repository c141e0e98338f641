/* The ways in which one process waits for a group's events. */
#define _GNU_SOURCE
#include "listener.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/select.h>
#include <sys/uio.h>
#include <unistd.h>

static char buffer[ROOM] __attribute__((aligned(8)));

/* One read(2) of at most that many bytes; 0: the queue is empty. */
static int take(int group, size_t size)
{
	ssize_t length = read(group, buffer, size);

	if (length < 0) {
		if (errno == EAGAIN)
			return 0;
		die("read");
	}
	handle(group, buffer, length);
	return 1;
}

/* read(2) waits. */
void wait_blocking(int group)
{
	say("ready");
	for (;;)
		take(group, sizeof(buffer));
}

/* poll(2), then one read. */
void wait_poll(int group)
{
	struct pollfd wanted = {.fd = group, .events = POLLIN};

	say("ready");
	for (;;) {
		if (poll(&wanted, 1, -1) < 0)
			die("poll");
		if (wanted.revents & POLLIN)
			take(group, sizeof(buffer));
	}
}

static void epoll_with(int group, uint32_t events, int until_empty, size_t size)
{
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event wanted = {.events = events, .data.fd = group}, found;

	if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, group, &wanted))
		die("epoll_ctl");
	say("ready");
	for (;;) {
		if (epoll_wait(epoll, &found, 1, -1) < 0)
			die("epoll_wait");
		while (take(found.data.fd, size) && until_empty)
			;
	}
}

void wait_epoll_level(int group)
{
	epoll_with(group, EPOLLIN, 0, sizeof(buffer));
}

/* Edge-triggered as epoll(7) wants it: until EAGAIN. */
void wait_epoll_edge(int group)
{
	epoll_with(group, EPOLLIN | EPOLLET, 1, sizeof(buffer));
}

/* Edge-triggered with one event for each wake-up: lives on every event being an edge of its own. */
void wait_epoll_edge_one(int group)
{
	epoll_with(group, EPOLLIN | EPOLLET, 0, ONE_EVENT);
}

void wait_select(int group)
{
	say("ready");
	for (;;) {
		fd_set readable;
		FD_ZERO(&readable);
		FD_SET(group, &readable);
		if (select(group + 1, &readable, NULL, NULL, NULL) < 0)
			die("select");
		if (FD_ISSET(group, &readable))
			take(group, sizeof(buffer));
	}
}

/* readv(2) into two parts, the first full with one event: the kernel reads again for the second. */
void wait_readv(int group)
{
	struct pollfd wanted = {.fd = group, .events = POLLIN};
	struct iovec parts[] = {{buffer, ONE_EVENT}, {buffer + ONE_EVENT, sizeof(buffer) - ONE_EVENT}};

	say("ready");
	for (;;) {
		if (poll(&wanted, 1, -1) < 0)
			die("poll");
		ssize_t length = readv(group, parts, 2);
		if (length < 0 && errno != EAGAIN)
			die("readv");
		if (length > 0)
			handle(group, buffer, length);
	}
}

/* No waiting at all: asks FIONREAD again and again. */
void wait_fionread(int group)
{
	say("ready");
	for (;;) {
		int queued = 0;
		if (ioctl(group, FIONREAD, &queued))
			die("FIONREAD");
		if (queued % FAN_EVENT_METADATA_LEN)
			say("FIONREAD %d", queued);
		if (queued)
			take(group, sizeof(buffer));
		else
			usleep(500);
	}
}

/* All that one read gave is answered by one writev(2) with a part for each; halves of an answer are none. */
void wait_writev(int group)
{
	say("ready");
	for (;;) {
		struct fanotify_response responses[ROOM / FAN_EVENT_METADATA_LEN];
		struct iovec parts[ROOM / FAN_EVENT_METADATA_LEN], halves[2];
		int count = 0;
		ssize_t length = read(group, buffer, sizeof(buffer)), rest = length;
		const struct fanotify_event_metadata *event = (const void *)buffer;

		if (length < 0)
			die("read");
		for (; FAN_EVENT_OK(event, rest); event = FAN_EVENT_NEXT(event, rest))
			if (decide(group, event, &responses[count])) {
				parts[count].iov_base = &responses[count];
				parts[count].iov_len = sizeof(*responses);
				count++;
			}
		halves[0] = (struct iovec){&responses[0], 4};
		halves[1] = (struct iovec){(char *)&responses[0] + 4, 4};
		if (count && (writev(group, halves, 2) != -1 || errno != EINVAL))
			die("an answer in halves");
		if (count && writev(group, parts, count) != (ssize_t)(count * sizeof(*responses)))
			die("writev");
		event = (const void *)buffer;
		for (rest = length; FAN_EVENT_OK(event, rest); event = FAN_EVENT_NEXT(event, rest))
			settle(event);
	}
}
