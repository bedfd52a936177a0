/* Lets a User Mode Linux of Linux 6.1 run on processors whose register state is longer than it knows (those with AMX: 11,008 bytes).
 *
 * It saves and restores its processes' extended registers with ptrace, in a buffer for AVX-512. The host gives it a part of them, but takes back nothing less than all
 * (xstateregs_set answers EFAULT), and the kernel panics at its first process. Preloaded, this hands over the rest too: zeros, which is what registers hold that no process of the
 * guest ever used, and whose bits in the header are clear. Where the host takes what it is given, nothing is different.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

#ifndef NT_X86_XSTATE
#define NT_X86_XSTATE 0x202
#endif

typedef long (*ptrace_t)(unsigned, pid_t, void *, void *);

static ptrace_t the_real;
/* How long the host has it; 0 until it is asked. */
static size_t whole_len;
/* The guest has one processor and no preemption: there is one caller at a time. Not on its stack, which is a small one. */
static char whole[1 << 16];

__attribute__((constructor)) static void find(void) {
    the_real = (ptrace_t)dlsym(RTLD_NEXT, "ptrace");
}

static long put_all(pid_t pid, void *type, const struct iovec *part) {
    struct iovec all = {whole, whole_len ? whole_len : sizeof whole};
    if (!whole_len) {
        long got = the_real(PTRACE_GETREGSET, pid, type, &all);
        if (got < 0)
            return got;
        whole_len = all.iov_len;
        memset(whole, 0, sizeof whole);
    }
    if (part->iov_len > whole_len) {
        errno = EFAULT;
        return -1;
    }
    memcpy(whole, part->iov_base, part->iov_len);
    return the_real(PTRACE_SETREGSET, pid, type, &all);
}

long ptrace(enum __ptrace_request request, ...) {
    va_list rest;
    va_start(rest, request);
    pid_t pid = va_arg(rest, pid_t);
    void *address = va_arg(rest, void *);
    void *data = va_arg(rest, void *);
    va_end(rest);
    int is_xstate = request == PTRACE_SETREGSET && address == (void *)NT_X86_XSTATE;
    if (is_xstate && whole_len)
        return put_all(pid, address, data);
    long done = the_real(request, pid, address, data);
    if (is_xstate && done < 0 && errno == EFAULT)
        return put_all(pid, address, data);
    return done;
}
