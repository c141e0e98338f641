/* program SIZE: a program of that size (its read-only data) that touches a fiftieth of its pages when it starts: every page of runs of RUN pages, or
 * single pages with RUN 1. The data is built in by PAYLOAD, a file. Prints the sum of the first bytes of these pages. */
#include <stdio.h>
#include <stdlib.h>

__asm__(".section .rodata\n.balign 4096\n.global payload\npayload:\n.incbin \"" PAYLOAD "\"\n.global payload_end\npayload_end:\n.byte 0\n.text\n");

extern const unsigned char payload[], payload_end[];

int main(int count, char **words)
{
    unsigned long run = count > 1 ? strtoul(words[1], NULL, 10) : 1;
    unsigned long pages = (payload_end - payload) / 4096, sum = 0;

    for (unsigned long first = 0; first + run <= pages; first += 50 * run)
        for (unsigned long page = first; page < first + run; page++)
            sum += *(const volatile unsigned char *)(payload + page * 4096);
    printf("%lu\n", sum);
    return 0;
}
