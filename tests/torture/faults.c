/* Makes a call of the file system fail, below one directory. Preloaded into a process (LD_PRELOAD); what is to fail is looked up in
   the environment at each call, so that a process that has it loaded can be forked and then told.

   FAULT_UNDER    calls on files below this directory count
   FAULT_CALLS    which: names out of "write open rename sync mkdir truncate remove", separated by spaces
   FAULT_AT       the number of the call that fails, from 1; 0: none does
   FAULT_STICKY   if set, all calls from then on fail too, as on a full disk
   FAULT_ERRNO    the error; 0: a write takes only half of what it is given
   FAULT_COUNTER  a file of 8 bytes in which calls are counted, for all threads and processes */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) {
    const char *under = getenv("FAULT_UNDER");
    return under && path && strncmp(path, under, strlen(under)) == 0;
}

static int is_open_below(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static uint64_t *counter(void) {
    static uint64_t *place;
    static char of[4096];
    const char *name = getenv("FAULT_COUNTER");
    if (!name) return NULL;
    if (place && strcmp(of, name) == 0) return place;
    int file = REAL(open)(name, O_RDWR);
    if (file < 0) return NULL;
    place = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    strncpy(of, name, sizeof of - 1);
    close(file);
    return place == MAP_FAILED ? NULL : place;
}

/* Whether this call is to fail: then errno is set. */
static int fails(const char *call) {
    const char *calls = getenv("FAULT_CALLS"), *at = getenv("FAULT_AT"), *error = getenv("FAULT_ERRNO");
    if (!calls || !at || !error || !strstr(calls, call)) return 0;
    uint64_t *count = counter();
    if (!count) return 0;
    uint64_t now = __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST), wanted = strtoull(at, NULL, 10);
    if (!wanted || now < wanted || (now > wanted && !getenv("FAULT_STICKY"))) return 0;
    errno = atoi(error);
    return 1;
}

#define IS_SHORT (errno == 0)
#define WRITE(name, position, given)                                                                                      \
    ssize_t name(int file, const void *bytes, size_t size position) {                                                    \
        if (is_open_below(file) && fails("write")) {                                                                      \
            if (!IS_SHORT) return -1;                                                                                     \
            size = size > 1 ? size / 2 : size;                                                                            \
        }                                                                                                                 \
        return REAL(name)(file, bytes, size given);                                                                       \
    }
#define COMMA ,
WRITE(write, , )
WRITE(pwrite, COMMA off_t at, COMMA at)
WRITE(pwrite64, COMMA off64_t at, COMMA at)

ssize_t writev(int file, const struct iovec *parts, int count) {
    if (is_open_below(file) && fails("write")) {
        if (!IS_SHORT) return -1;
        count = count > 1 ? count / 2 : count;
    }
    return REAL(writev)(file, parts, count);
}

#define MODE(flags)                                                                                                       \
    va_list more;                                                                                                         \
    va_start(more, flags);                                                                                                \
    mode_t mode = (flags) & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                             \
    va_end(more)
#define MAKES(flags) ((flags) & O_CREAT)

#define OPEN(name)                                                                                                        \
    int name(const char *path, int flags, ...) {                                                                          \
        MODE(flags);                                                                                                      \
        return MAKES(flags) && below(path) && fails("open") ? -1 : REAL(name)(path, flags, mode);                         \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                      \
    int name(int folder, const char *path, int flags, ...) {                                                              \
        MODE(flags);                                                                                                      \
        return MAKES(flags) && below(path) && fails("open") ? -1 : REAL(name)(folder, path, flags, mode);                 \
    }
OPENAT(openat)
OPENAT(openat64)

int rename(const char *from, const char *to) { return below(to) && fails("rename") ? -1 : REAL(rename)(from, to); }

int renameat(int a, const char *from, int b, const char *to) {
    return below(to) && fails("rename") ? -1 : REAL(renameat)(a, from, b, to);
}

int fsync(int file) { return is_open_below(file) && fails("sync") ? -1 : REAL(fsync)(file); }

int fdatasync(int file) { return is_open_below(file) && fails("sync") ? -1 : REAL(fdatasync)(file); }

int mkdir(const char *path, mode_t mode) { return below(path) && fails("mkdir") ? -1 : REAL(mkdir)(path, mode); }

int ftruncate(int file, off_t size) { return is_open_below(file) && fails("truncate") ? -1 : REAL(ftruncate)(file, size); }

int ftruncate64(int file, off64_t size) {
    return is_open_below(file) && fails("truncate") ? -1 : REAL(ftruncate64)(file, size);
}

int unlink(const char *path) { return below(path) && fails("remove") ? -1 : REAL(unlink)(path); }

int rmdir(const char *path) { return below(path) && fails("remove") ? -1 : REAL(rmdir)(path); }

int unlinkat(int folder, const char *path, int flags) {
    return (below(path) || is_open_below(folder)) && fails("remove") ? -1 : REAL(unlinkat)(folder, path, flags);
}
