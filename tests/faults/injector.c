/* Preloaded (LD_PRELOAD) into a Python whose children meet a fault at their n-th file operation below a folder.

   Operations: creating or opening for writing, writing, flushing, renaming, removing, making folders, truncating, linking,
   changing permissions, locking; if asked, also opening for reading and reading. All threads count together. The plan lies in
   memory that is shared with the parent, who reads the number of operations and the place of the fault from it, whatever became
   of the child. Until a child calls faults_arm, every function below is the C library's own. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* The same structure as injector.py's Plan. */
enum action { COUNT, KILL_BEFORE, KILL_MIDDLE, KILL_AFTER, SIGNAL, FAIL };

typedef struct {
    int action;  /* an action from the enumeration above */
    int number;  /* FAIL: the errno; SIGNAL: the signal */
    int lasting; /* FAIL: whether all operations from the n-th on fail */
    int reads;   /* whether reading counts, too */
    long at;     /* n, from 1 */
    long count;  /* out: operations so far */
    int fired;   /* out: whether the fault has happened */
    char folder[1024];
    char where[1024]; /* out: the operation at which it happened */
} plan_t;

static plan_t *plan;

void faults_arm(plan_t *shared) { plan = shared; }

enum kind { OPEN_NEW, OPEN_READ, READ, WRITE, FLUSH, RENAME, REMOVE, FOLDER, LINK, MODE, LOCK };
static const char *const NAMES[] = {"create", "open", "read", "write", "flush", "rename", "remove", "mkdir", "link", "chmod", "lock"};

/* Whether an operation of this kind can fail with this errno at all: removing needs no space, and so on. */
static int can_fail(enum kind kind, int error) {
    switch (error) {
    case ENOSPC: case EDQUOT: return kind == OPEN_NEW || kind == WRITE || kind == FLUSH || kind == FOLDER || kind == LINK || kind == RENAME;
    case EROFS: return kind != OPEN_READ && kind != READ && kind != LOCK && kind != WRITE && kind != FLUSH;
    case EACCES: return kind != READ && kind != WRITE && kind != FLUSH && kind != LOCK;
    case EMFILE: return kind == OPEN_NEW || kind == OPEN_READ;
    case ENOLCK: return kind == LOCK;
    default: return kind != LOCK;
    }
}

static void die(void) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;) pause();
}

/* The absolute path of (folder descriptor, path), or of a descriptor alone; 0 if it is not below the plan's folder. */
static int below(int at, const char *path, char *full, size_t size) {
    size_t used = 0;
    if (!path || path[0] != '/') {
        char link[64];
        if (at == AT_FDCWD) strcpy(link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, full, size - 1);
        if (length < 0) return 0;
        used = (size_t)length;
        full[used] = 0;
    }
    if (path) snprintf(full + used, size - used, "%s%s", used ? "/" : "", path);
    size_t length = strlen(plan->folder);
    return !strncmp(full, plan->folder, length) && (full[length] == '/' || !full[length]);
}

/* What the caller is to do: COUNT (go on), FAIL (errno is set), KILL_MIDDLE, KILL_AFTER. */
static enum action step(enum kind kind, int at, const char *path) {
    char full[2048];
    int error = errno;
    if (!plan || (!plan->reads && (kind == READ || kind == OPEN_READ)) || !below(at, path, full, sizeof full)) {
        errno = error;
        return COUNT;
    }
    errno = error;
    long n = __atomic_add_fetch(&plan->count, 1, __ATOMIC_SEQ_CST);
    if (plan->action == COUNT || n < plan->at) return COUNT;
    if (plan->action == FAIL) {
        if ((plan->fired && !plan->lasting) || !can_fail(kind, plan->number)) return COUNT;
    } else if (plan->fired) {
        return COUNT;
    }
    if (!plan->fired) snprintf(plan->where, sizeof plan->where, "%s %s", NAMES[kind], full + strlen(plan->folder));
    plan->fired = 1;
    switch (plan->action) {
    case KILL_BEFORE: die();
    case SIGNAL:
        kill(getpid(), plan->number);
        errno = error;
        return COUNT;
    case FAIL: errno = plan->number; return FAIL;
    default: return plan->action;
    }
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* The C library's function in place of ours, with the fault at its n-th call; `half` is done first where it dies in the middle. */
#define FAULTY(type, kind, at, path, failed, half, call) \
    switch (step(kind, at, path)) { \
    case FAIL: return failed; \
    case KILL_MIDDLE: half; die(); \
    case KILL_AFTER: { type done = call; (void)done; die(); } \
    default: return call; \
    }

static enum kind opening(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC) ? OPEN_NEW : OPEN_READ; }

#define MODE_OF(flags) \
    mode_t mode = 0; \
    if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = (mode_t)va_arg(rest, int); \
        va_end(rest); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        MODE_OF(flags) \
        REAL(name); \
        FAULTY(int, opening(flags), AT_FDCWD, path, -1, (void)real(path, flags, mode), real(path, flags, mode)) \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        MODE_OF(flags) \
        REAL(name); \
        FAULTY(int, opening(flags), at, path, -1, (void)real(at, path, flags, mode), real(at, path, flags, mode)) \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        enum kind kind = strpbrk(mode, "wa+") ? OPEN_NEW : OPEN_READ; \
        FAULTY(FILE *, kind, AT_FDCWD, path, NULL, (void)real(path, mode), real(path, mode)) \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t read(int file, void *buffer, size_t size) {
    REAL(read);
    FAULTY(ssize_t, READ, file, NULL, -1, (void)0, real(file, buffer, size))
}

ssize_t write(int file, const void *buffer, size_t size) {
    REAL(write);
    FAULTY(ssize_t, WRITE, file, NULL, -1, (void)!real(file, buffer, size / 2), real(file, buffer, size))
}

#define PWRITE(name, offset_t) \
    ssize_t name(int file, const void *buffer, size_t size, offset_t offset) { \
        REAL(name); \
        FAULTY(ssize_t, WRITE, file, NULL, -1, (void)!real(file, buffer, size / 2, offset), real(file, buffer, size, offset)) \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev);
    FAULTY(ssize_t, WRITE, file, NULL, -1, (void)!write(file, parts[0].iov_base, parts[0].iov_len / 2), real(file, parts, count))
}

ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    REAL(sendfile);
    FAULTY(ssize_t, WRITE, to, NULL, -1, (void)!real(to, from, offset, size / 2), real(to, from, offset, size))
}

#define SENDFILE64(name) \
    ssize_t name(int to, int from, off64_t *offset, size_t size) { \
        REAL(name); \
        FAULTY(ssize_t, WRITE, to, NULL, -1, (void)!real(to, from, offset, size / 2), real(to, from, offset, size)) \
    }
SENDFILE64(sendfile64)

ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *end, size_t size, unsigned flags) {
    REAL(copy_file_range);
    FAULTY(ssize_t, WRITE, to, NULL, -1, (void)!real(from, start, to, end, size / 2, flags), real(from, start, to, end, size, flags))
}

int ftruncate(int file, off_t size) {
    REAL(ftruncate);
    FAULTY(int, WRITE, file, NULL, -1, (void)!real(file, size / 2), real(file, size))
}

int ftruncate64(int file, off64_t size) {
    REAL(ftruncate64);
    FAULTY(int, WRITE, file, NULL, -1, (void)!real(file, size / 2), real(file, size))
}

int fsync(int file) {
    REAL(fsync);
    FAULTY(int, FLUSH, file, NULL, -1, (void)0, real(file))
}

int fdatasync(int file) {
    REAL(fdatasync);
    FAULTY(int, FLUSH, file, NULL, -1, (void)0, real(file))
}

/* Renaming is atomic: there is no middle. */
int rename(const char *from, const char *to) {
    REAL(rename);
    FAULTY(int, RENAME, AT_FDCWD, to, -1, (void)real(from, to), real(from, to))
}

int renameat(int at_from, const char *from, int at_to, const char *to) {
    REAL(renameat);
    FAULTY(int, RENAME, at_to, to, -1, (void)real(at_from, from, at_to, to), real(at_from, from, at_to, to))
}

int unlink(const char *path) {
    REAL(unlink);
    FAULTY(int, REMOVE, AT_FDCWD, path, -1, (void)real(path), real(path))
}

int unlinkat(int at, const char *path, int flags) {
    REAL(unlinkat);
    FAULTY(int, REMOVE, at, path, -1, (void)real(at, path, flags), real(at, path, flags))
}

int rmdir(const char *path) {
    REAL(rmdir);
    FAULTY(int, REMOVE, AT_FDCWD, path, -1, (void)real(path), real(path))
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    FAULTY(int, FOLDER, AT_FDCWD, path, -1, (void)real(path, mode), real(path, mode))
}

int mkdirat(int at, const char *path, mode_t mode) {
    REAL(mkdirat);
    FAULTY(int, FOLDER, at, path, -1, (void)real(at, path, mode), real(at, path, mode))
}

int link(const char *from, const char *to) {
    REAL(link);
    FAULTY(int, LINK, AT_FDCWD, to, -1, (void)real(from, to), real(from, to))
}

int symlink(const char *target, const char *path) {
    REAL(symlink);
    FAULTY(int, LINK, AT_FDCWD, path, -1, (void)real(target, path), real(target, path))
}

int chmod(const char *path, mode_t mode) {
    REAL(chmod);
    FAULTY(int, MODE, AT_FDCWD, path, -1, (void)real(path, mode), real(path, mode))
}

int fchmod(int file, mode_t mode) {
    REAL(fchmod);
    FAULTY(int, MODE, file, NULL, -1, (void)real(file, mode), real(file, mode))
}

int fchmodat(int at, const char *path, mode_t mode, int flags) {
    REAL(fchmodat);
    FAULTY(int, MODE, at, path, -1, (void)real(at, path, mode, flags), real(at, path, mode, flags))
}

int flock(int file, int operation) {
    REAL(flock);
    FAULTY(int, LOCK, file, NULL, -1, (void)real(file, operation), real(file, operation))
}
