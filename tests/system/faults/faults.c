/* Injects faults of the disk and the clock for tests; loaded with LD_PRELOAD and controlled through ctypes.

   Only calls that change something below one folder are counted and can fail. A call has the same number in each run, as
   long as the work is done in the same order. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sendfile.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OFF, COUNT, FAIL, SHORT, KILL, ROOM, READ_ONLY, SIGNAL };

static char folder[PATH_MAX];
static int mode = OFF, failure;
static long place;
static atomic_long calls, room, hits;
static char hit_name[32];

void faults_arm(const char *below, int how, long at, int number, long bytes) {
    snprintf(folder, sizeof folder, "%s", below);
    place = at;
    failure = number;
    calls = 0;
    hits = 0;
    room = bytes;
    hit_name[0] = 0;
    mode = how;
}

void faults_disarm(void) { mode = OFF; }
long faults_calls(void) { return calls; }
long faults_hits(void) { return hits; }
const char *faults_hit_name(void) { return hit_name; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Returns whether a path is below the folder; a relative path starts at the file descriptor `at`. */
static int is_below(int at, const char *path) {
    char whole[PATH_MAX * 2], link[64];
    if (path[0] != '/') {
        snprintf(link, sizeof link, at == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, whole, PATH_MAX - 1);
        if (length < 0) return 0;
        snprintf(whole + length, PATH_MAX, "/%s", path);
        path = whole;
    }
    size_t length = strlen(folder);
    return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int is_file_below(int handle) {
    char link[64], whole[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, whole, sizeof whole - 1);
    if (length < 0) return 0;
    whole[length] = 0;
    return whole[0] == '/' && is_below(AT_FDCWD, whole);
}

static int exists(int at, const char *path) {
    struct stat facts;
    int before = errno, there = !fstatat(at, path, &facts, AT_SYMLINK_NOFOLLOW);
    errno = before;
    return there;
}

static void note(const char *name) {
    if (atomic_fetch_add(&hits, 1) == 0) snprintf(hit_name, sizeof hit_name, "%s", name);
}

/* Counts a call that writes no bytes; returns 1, with errno set, if it must fail. */
static int fails(const char *name) {
    if (mode == READ_ONLY) {
        note(name);
        errno = EROFS;
        return 1;
    }
    if (atomic_fetch_add(&calls, 1) + 1 != place) return 0;
    note(name);
    if (mode == KILL) kill(getpid(), SIGKILL);
    if (mode == SIGNAL) kill(getpid(), failure);
    if (mode != FAIL) return 0;
    errno = failure;
    return 1;
}

/* Counts a call that writes bytes; returns how many it may write, or -1, with errno set, if it must fail. */
static ssize_t allowed(const char *name, size_t wanted, int *dies) {
    *dies = 0;
    if (mode == ROOM) {
        atomic_fetch_add(&calls, 1);
        long left = atomic_fetch_sub(&room, (long)wanted);
        if (left >= (long)wanted) return (ssize_t)wanted;
        note(name);
        room = 0;
        errno = ENOSPC;
        return left > 0 ? left : -1;
    }
    if (mode == SHORT || mode == KILL) {
        if (atomic_fetch_add(&calls, 1) + 1 != place) return (ssize_t)wanted;
        note(name);
        *dies = mode == KILL;
        return wanted > 1 ? (ssize_t)(wanted / 2) : (ssize_t)wanted;
    }
    return fails(name) ? -1 : (ssize_t)wanted;
}

#define WRITER(signature, name, handle, size, call)                       \
    ssize_t signature {                                                   \
        __typeof__(&name) real = REAL(name);                              \
        if (mode == OFF || !is_file_below(handle)) return call(size);     \
        int dies;                                                         \
        ssize_t may = allowed(#name, size, &dies);                        \
        if (may < 0) return -1;                                           \
        ssize_t done = call((size_t)may);                                 \
        if (dies) kill(getpid(), SIGKILL);                                \
        return done;                                                      \
    }

#define PLAIN(bytes) real(handle, content, bytes)
WRITER(write(int handle, const void *content, size_t count), write, handle, count, PLAIN)
#undef PLAIN
#define PLACED(bytes) real(handle, content, bytes, offset)
WRITER(pwrite(int handle, const void *content, size_t count, off_t offset), pwrite, handle, count, PLACED)
WRITER(pwrite64(int handle, const void *content, size_t count, off64_t offset), pwrite64, handle, count, PLACED)
#undef PLACED
#define SENT(bytes) real(handle, source, offset, bytes)
WRITER(sendfile(int handle, int source, off_t *offset, size_t count), sendfile, handle, count, SENT)
WRITER(sendfile64(int handle, int source, off64_t *offset, size_t count), sendfile64, handle, count, SENT)
#undef SENT
#define COPIED(bytes) real(source, from, handle, to, bytes, flags)
WRITER(copy_file_range(int source, off64_t *from, int handle, off64_t *to, size_t count, unsigned flags), copy_file_range,
       handle, count, COPIED)
#undef COPIED

static size_t total(const struct iovec *pieces, int count) {
    size_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += pieces[i].iov_len;
    return bytes;
}

/* A short writev writes only from its first non-empty buffer. */
ssize_t writev(int handle, const struct iovec *pieces, int count) {
    __typeof__(&writev) real = REAL(writev);
    if (mode == OFF || !is_file_below(handle)) return real(handle, pieces, count);
    size_t bytes = total(pieces, count);
    int dies;
    ssize_t may = allowed("writev", bytes, &dies);
    if (may < 0) return -1;
    while (count > 1 && !pieces->iov_len) pieces++, count--;
    struct iovec first = {pieces->iov_base, pieces->iov_len < (size_t)may ? pieces->iov_len : (size_t)may};
    ssize_t done = (size_t)may == bytes ? real(handle, pieces, count) : real(handle, &first, 1);
    if (dies) kill(getpid(), SIGKILL);
    return done;
}

#define ON_HANDLE(signature, name, handle, call)                                           \
    int signature {                                                                        \
        if (mode != OFF && mode != SHORT && is_file_below(handle) && fails(#name)) return -1; \
        return REAL(name) call;                                                            \
    }

/* Not really flushed: flushing would take most of the time, and no test simulates a power failure. */
#define FLUSHER(name)                                                                      \
    int name(int handle) {                                                                 \
        if (mode == OFF || !is_file_below(handle)) return REAL(name)(handle);              \
        return mode != SHORT && mode != READ_ONLY && fails(#name) ? -1 : 0;                \
    }

FLUSHER(fsync)
FLUSHER(fdatasync)
ON_HANDLE(ftruncate(int handle, off_t length), ftruncate, handle, (handle, length))
ON_HANDLE(ftruncate64(int handle, off64_t length), ftruncate64, handle, (handle, length))
ON_HANDLE(fchmod(int handle, mode_t bits), fchmod, handle, (handle, bits))

static int open_fails(const char *name, int at, const char *path, int flags) {
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & O_TRUNC;
    if (mode == OFF || mode == SHORT || !is_below(at, path)) return 0;
    int there = exists(at, path);
    if (mode == READ_ONLY) return ((flags & O_CREAT && !there) || (there && writes)) && fails(name);
    return flags & O_CREAT && (!there || flags & O_TRUNC) && fails(name);
}

#define OPENER(name, parameters, at, call)                                     \
    int name parameters {                                                      \
        mode_t bits = 0;                                                       \
        if (flags & (O_CREAT | O_TMPFILE)) {                                   \
            va_list more;                                                      \
            va_start(more, flags);                                             \
            bits = va_arg(more, mode_t);                                       \
            va_end(more);                                                      \
        }                                                                      \
        if (open_fails(#name, at, path, flags)) return -1;                     \
        return REAL(name) call;                                                \
    }

OPENER(open, (const char *path, int flags, ...), AT_FDCWD, (path, flags, bits))
OPENER(open64, (const char *path, int flags, ...), AT_FDCWD, (path, flags, bits))
OPENER(openat, (int at, const char *path, int flags, ...), at, (at, path, flags, bits))
OPENER(openat64, (int at, const char *path, int flags, ...), at, (at, path, flags, bits))

int mkdirat(int at, const char *path, mode_t bits) {
    if (mode != OFF && mode != SHORT && is_below(at, path) && !exists(at, path) && fails("mkdir")) return -1;
    return REAL(mkdirat)(at, path, bits);
}

int mkdir(const char *path, mode_t bits) { return mkdirat(AT_FDCWD, path, bits); }

int renameat2(int from_at, const char *from, int at, const char *path, unsigned flags) {
    if (mode != OFF && mode != SHORT && is_below(at, path) && fails("rename")) return -1;
    return REAL(renameat2)(from_at, from, at, path, flags);
}

int renameat(int from_at, const char *from, int at, const char *path) { return renameat2(from_at, from, at, path, 0); }
int rename(const char *from, const char *path) { return renameat2(AT_FDCWD, from, AT_FDCWD, path, 0); }

/* Removing files needs no space, so it fails only on a read-only disk. */
int unlinkat(int at, const char *path, int flags) {
    if (mode == READ_ONLY && is_below(at, path) && exists(at, path) && fails("unlink")) return -1;
    return REAL(unlinkat)(at, path, flags);
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

/* The clock is off by some seconds at first, and by another offset from some call on. */

static long early, late, change = -1;
static atomic_long looks;

void faults_clock(long before, long after, long at) {
    early = before;
    late = after;
    looks = 0;
    change = at;
}

long faults_looks(void) { return looks; }

static long offset(void) { return change < 0 ? 0 : atomic_fetch_add(&looks, 1) < change ? early : late; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = REAL(clock_gettime)(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = REAL(gettimeofday)(now, zone);
    if (!failed) now->tv_sec += offset();
    return failed;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
