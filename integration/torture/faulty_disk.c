/* A disk that fails on demand: loaded before libc (LD_PRELOAD), it counts the calls that change anything below one
 * folder and lets one of them, and where asked every later one, fail. faulty_disk.py holds the other half. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { GROWS = 1, SYNCS = 2 }; /* takes room on the disk; waits for it. All others only change names or attributes. */

struct control { /* in step with _Control in faulty_disk.py */
    long calls;          /* of the kind that can fail, since the counter was set back */
    long fail_at;        /* 1 for the first; 0 for never */
    long failed;         /* calls that failed, or deletions of `vanish` */
    int error;           /* errno; 0 deletes `vanish` instead, and the call goes through */
    int sticky;          /* whether every later call fails too */
    int only_growing;    /* whether only calls that take room count */
    int fsync_ms;        /* what every fsync takes longer */
    char root[1024], vanish[1024], call[32], path[1024];
};

static struct control *control;

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }
#define REAL(name) ((__typeof__(&name))real(#name))

__attribute__((constructor)) static void start(void) {
    const char *file = getenv("FAULTY_DISK");
    if (!file) return;
    int fd = REAL(open)(file, O_RDWR);
    if (fd < 0) return;
    void *found = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (found != MAP_FAILED) control = found;
    close(fd);
}

/* Whether this call is to fail; errno is then set. */
static int fails(const char *call, int kind, int folder, const char *name) {
    if (!control || !control->root[0]) return 0;
    char path[PATH_MAX] = "", link[64];
    size_t have = 0;
    if (!name || name[0] != '/') {
        if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, path, sizeof path - 1);
        if (length < 0) return 0;
        have = (size_t)length;
        path[have] = 0;
    }
    if (name) snprintf(path + have, sizeof path - have, "%s%s", have ? "/" : "", name);
    if (strncmp(path, control->root, strlen(control->root))) return 0;
    if (kind == SYNCS && control->fsync_ms) {
        struct timespec pause = {control->fsync_ms / 1000, control->fsync_ms % 1000 * 1000000L};
        nanosleep(&pause, NULL);
    }
    if (control->only_growing && !kind) return 0;
    long number = __atomic_add_fetch(&control->calls, 1, __ATOMIC_SEQ_CST);
    if (!control->fail_at || (control->sticky ? number < control->fail_at : number != control->fail_at)) return 0;
    if (!__atomic_fetch_add(&control->failed, 1, __ATOMIC_SEQ_CST)) {
        snprintf(control->call, sizeof control->call, "%s", call);
        snprintf(control->path, sizeof control->path, "%.1000s", path);
    }
    if (!control->error) {
        REAL(unlink)(control->vanish);
        return 0;
    }
    errno = control->error;
    return 1;
}

#define BY_NAME(result, name, folder, path, kind, parameters, arguments) \
    result name parameters { return fails(#name, kind, folder, path) ? -1 : REAL(name) arguments; }
#define BY_FD(result, name, fd, kind, parameters, arguments) BY_NAME(result, name, fd, NULL, kind, parameters, arguments)

/* Opening counts when it makes, empties or may write a file. */
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        MODE(flags) \
        if (CHANGES(flags) && fails("open", (flags) & O_CREAT ? GROWS : 0, AT_FDCWD, path)) return -1; \
        return REAL(name)(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        MODE(flags) \
        if (CHANGES(flags) && fails("open", (flags) & O_CREAT ? GROWS : 0, folder, path)) return -1; \
        return REAL(name)(folder, path, flags, mode); \
    }
#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        if (strpbrk(mode, "wa+") && fails("fopen", GROWS, AT_FDCWD, path)) return NULL; \
        return REAL(name)(path, mode); \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) FOPEN(fopen) FOPEN(fopen64)

/* A full disk takes a part of what it is given before it takes nothing. */
ssize_t write(int fd, const void *data, size_t size) {
    if (!fails("write", GROWS, fd, NULL)) return REAL(write)(fd, data, size);
    if (control->error == ENOSPC && control->failed == 1 && size > 1) return REAL(write)(fd, data, size / 2);
    return -1;
}

BY_FD(ssize_t, pwrite, fd, GROWS, (int fd, const void *d, size_t n, off_t o), (fd, d, n, o))
BY_FD(ssize_t, pwrite64, fd, GROWS, (int fd, const void *d, size_t n, off64_t o), (fd, d, n, o))
BY_FD(ssize_t, writev, fd, GROWS, (int fd, const struct iovec *v, int n), (fd, v, n))
BY_FD(ssize_t, pwritev, fd, GROWS, (int fd, const struct iovec *v, int n, off_t o), (fd, v, n, o))
BY_FD(ssize_t, pwritev64, fd, GROWS, (int fd, const struct iovec *v, int n, off64_t o), (fd, v, n, o))
BY_FD(ssize_t, sendfile, out, GROWS, (int out, int in, off_t *o, size_t n), (out, in, o, n))
BY_FD(ssize_t, sendfile64, out, GROWS, (int out, int in, off64_t *o, size_t n), (out, in, o, n))
BY_FD(ssize_t, copy_file_range, out, GROWS, (int in, off64_t *i, int out, off64_t *o, size_t n, unsigned f),
      (in, i, out, o, n, f))
BY_FD(int, fallocate, fd, GROWS, (int fd, int mode, off_t o, off_t n), (fd, mode, o, n))
BY_FD(int, fallocate64, fd, GROWS, (int fd, int mode, off64_t o, off64_t n), (fd, mode, o, n))
BY_FD(int, ftruncate, fd, GROWS, (int fd, off_t n), (fd, n))
BY_FD(int, ftruncate64, fd, GROWS, (int fd, off64_t n), (fd, n))
BY_FD(int, fsync, fd, SYNCS, (int fd), (fd))
BY_FD(int, fdatasync, fd, SYNCS, (int fd), (fd))
BY_FD(int, fchmod, fd, 0, (int fd, mode_t mode), (fd, mode))
BY_NAME(int, mkdir, AT_FDCWD, path, GROWS, (const char *path, mode_t mode), (path, mode))
BY_NAME(int, mkdirat, folder, path, GROWS, (int folder, const char *path, mode_t mode), (folder, path, mode))
BY_NAME(int, link, AT_FDCWD, to, GROWS, (const char *from, const char *to), (from, to))
BY_NAME(int, linkat, b, to, GROWS, (int a, const char *from, int b, const char *to, int f), (a, from, b, to, f))
BY_NAME(int, symlink, AT_FDCWD, to, GROWS, (const char *from, const char *to), (from, to))
BY_NAME(int, rename, AT_FDCWD, to, GROWS, (const char *from, const char *to), (from, to))
BY_NAME(int, renameat, b, to, GROWS, (int a, const char *from, int b, const char *to), (a, from, b, to))
BY_NAME(int, unlink, AT_FDCWD, path, 0, (const char *path), (path))
BY_NAME(int, unlinkat, folder, path, 0, (int folder, const char *path, int flags), (folder, path, flags))
BY_NAME(int, rmdir, AT_FDCWD, path, 0, (const char *path), (path))
BY_NAME(int, chmod, AT_FDCWD, path, 0, (const char *path, mode_t mode), (path, mode))
BY_NAME(int, utimensat, folder, path, 0, (int folder, const char *path, const struct timespec t[2], int f),
        (folder, path, t, f))
