/*
 * The accessor of the benchmark: does one thing many times and prints nanoseconds.
 *
 *   accessor pread FILE COUNT SIZE      COUNT preads of SIZE bytes at different offsets of one open file
 *   accessor map   FILE COUNT           COUNT times mmap and munmap of its first page
 *   accessor stat  LIST                 fstatat() of every path in LIST (one a line, relative to the working directory)
 *   accessor open  LIST                 open, read to the end, close of every path in LIST
 *   accessor missing LIST               fstatat() of every path in LIST, none of which exists
 *   accessor read  FILE SIZE            one sequential read of the whole file in pieces of SIZE bytes
 *   accessor many pread|touch FILE THREADS COUNT FIRST
 *                                       THREADS threads at once, each COUNT pages of FILE, from page FIRST on, none twice
 *
 * Output: one line, "TOTAL OPERATIONS MEDIAN BYTES LATE": nanoseconds in all, how many operations, the median operation's
 * nanoseconds, how many bytes were read, and the nanoseconds that one operation in a hundred exceeds. Only system calls stand
 * between the two clock readings.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what)
{
	fprintf(stderr, "accessor: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static int by_value(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return (a > b) - (a < b);
}

static void *allocate(size_t size)
{
	void *memory = malloc(size ? size : 1);

	if (!memory)
		fail("malloc");
	memset(memory, 1, size); /* page faults belong before the clock */
	return memory;
}

static void report(uint64_t total, uint64_t *each, size_t count, uint64_t bytes)
{
	qsort(each, count, sizeof(*each), by_value);
	printf("%llu %zu %llu %llu %llu\n", (unsigned long long)total, count,
	       count ? (unsigned long long)each[count / 2] : 0ULL, (unsigned long long)bytes,
	       count ? (unsigned long long)each[count * 99 / 100] : 0ULL);
}

static uint64_t read_to_end(int fd, char *buffer, size_t size)
{
	uint64_t bytes = 0;

	for (;;) {
		ssize_t got = read(fd, buffer, size);

		if (got < 0)
			fail("read");
		if (got == 0)
			return bytes;
		bytes += (uint64_t)got;
	}
}

static void preads(const char *path, size_t count, size_t size)
{
	uint64_t *each = allocate(count * sizeof(*each)), bytes = 0, start, before, after;
	char *buffer = allocate(size);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat status;
	size_t places, index;

	if (fd < 0 || fstat(fd, &status))
		fail(path);
	places = (size_t)status.st_size / size;
	if (!places) {
		errno = EINVAL;
		fail(path);
	}
	start = before = now();
	for (index = 0; index < count; index++) {
		/* A prime stride: neighbours never follow each other, so no read-ahead helps anyone. */
		off_t offset = (off_t)((index * 1009) % places * size);
		ssize_t got = pread(fd, buffer, size, offset);

		if (got != (ssize_t)size)
			fail("pread");
		bytes += (uint64_t)got;
		after = now();
		each[index] = after - before;
		before = after;
	}
	report(before - start, each, count, bytes);
}

/* Maps the first page and looks at nothing. */
static void maps(const char *path, size_t count)
{
	uint64_t *each = allocate(count * sizeof(*each)), start, before, after;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	size_t index;

	if (fd < 0)
		fail(path);
	start = before = now();
	for (index = 0; index < count; index++) {
		void *place = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0);

		if (place == MAP_FAILED || munmap(place, 4096))
			fail("mmap");
		after = now();
		each[index] = after - before;
		before = after;
	}
	report(after - start, each, count, 0);
}

static char **read_list(const char *path, size_t *count)
{
	FILE *list = fopen(path, "r");
	size_t room = 1024, length = 0;
	char **names = allocate(room * sizeof(*names)), *line = NULL;
	ssize_t got;

	if (!list)
		fail(path);
	*count = 0;
	while ((got = getline(&line, &length, list)) > 0) {
		if (line[got - 1] == '\n')
			line[got - 1] = 0;
		if (*count == room) {
			room *= 2;
			names = realloc(names, room * sizeof(*names));
			if (!names)
				fail("realloc");
		}
		names[(*count)++] = strdup(line);
	}
	free(line);
	fclose(list);
	return names;
}

enum what { STAT, WHOLE, MISSING };

static void each_of(const char *list, enum what what)
{
	static char buffer[65536];
	size_t count, index;
	char **names = read_list(list, &count);
	uint64_t *each = allocate(count * sizeof(*each)), bytes = 0, start, before, after;
	struct stat status;

	start = before = now();
	for (index = 0; index < count; index++) {
		if (what == WHOLE) {
			int fd = open(names[index], O_RDONLY | O_CLOEXEC);

			if (fd < 0)
				fail(names[index]);
			bytes += read_to_end(fd, buffer, sizeof(buffer));
			close(fd);
		} else if (!fstatat(AT_FDCWD, names[index], &status, AT_SYMLINK_NOFOLLOW) != (what == STAT)) {
			fail(names[index]);
		}
		after = now();
		each[index] = after - before;
		before = after;
	}
	report(before - start, each, count, bytes);
}

static void sequential(const char *path, size_t size)
{
	char *buffer = allocate(size);
	uint64_t start = now(), bytes, total;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		fail(path);
	bytes = read_to_end(fd, buffer, size);
	close(fd);
	total = now() - start;
	report(total, &total, 1, bytes);
}

struct many {
	pthread_t thread;
	uint64_t *each;
	size_t count, first;
	int fd;
	volatile char *mapping; /* NULL: pread */
};

static void *one_of_many(void *argument)
{
	struct many *mine = argument;
	char page[4096];
	size_t index;

	for (index = 0; index < mine->count; index++) {
		off_t offset = (off_t)(mine->first + index) * 4096;
		uint64_t before = now();

		if (mine->mapping)
			page[0] = mine->mapping[offset];
		else if (pread(mine->fd, page, sizeof(page), offset) != (ssize_t)sizeof(page))
			fail("pread");
		mine->each[index] = now() - before;
	}
	return NULL;
}

static void many(const char *how, const char *path, size_t threads, size_t count, size_t first)
{
	uint64_t *each = allocate(threads * count * sizeof(*each)), start;
	struct many *all = allocate(threads * sizeof(*all));
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	volatile char *mapping = NULL;
	struct stat status;
	size_t index;

	if (fd < 0 || fstat(fd, &status))
		fail(path);
	if (!strcmp(how, "touch")) {
		void *mapped = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);

		/* One page at a time, to measure the waiting and not read-ahead. */
		if (mapped == MAP_FAILED || madvise(mapped, (size_t)status.st_size, MADV_RANDOM))
			fail("mmap");
		mapping = mapped;
	}
	start = now();
	for (index = 0; index < threads; index++) {
		all[index] = (struct many){.each = each + index * count, .count = count,
					   .first = first + index * count, .fd = fd, .mapping = mapping};
		if (pthread_create(&all[index].thread, NULL, one_of_many, &all[index]))
			fail("pthread_create");
	}
	for (index = 0; index < threads; index++)
		pthread_join(all[index].thread, NULL);
	report(now() - start, each, threads * count, threads * count * 4096);
}

int main(int count, char **arguments)
{
	const char *action = count > 2 ? arguments[1] : "";

	if (!strcmp(action, "pread") && count == 5)
		preads(arguments[2], strtoul(arguments[3], NULL, 10), strtoul(arguments[4], NULL, 10));
	else if (!strcmp(action, "map") && count == 4)
		maps(arguments[2], (size_t)atol(arguments[3]));
	else if (!strcmp(action, "stat") && count == 3)
		each_of(arguments[2], STAT);
	else if (!strcmp(action, "open") && count == 3)
		each_of(arguments[2], WHOLE);
	else if (!strcmp(action, "missing") && count == 3)
		each_of(arguments[2], MISSING);
	else if (!strcmp(action, "read") && count == 4)
		sequential(arguments[2], strtoul(arguments[3], NULL, 10));
	else if (!strcmp(action, "many") && count == 7)
		many(arguments[2], arguments[3], strtoul(arguments[4], NULL, 10), strtoul(arguments[5], NULL, 10),
		     strtoul(arguments[6], NULL, 10));
	else {
		fputs("usage: accessor pread FILE COUNT SIZE | map FILE COUNT | stat LIST | open LIST | missing LIST | read FILE SIZE | many ...\n", stderr);
		return 2;
	}
	return 0;
}
