/* The one-file binary: unpacks its files into a directory of the user's at its first start, and becomes the
 * program in there.
 *
 * - There is one process: signals, the exit status, systemd's notifications and sockets need nobody between.
 * - A later start only checks that the files are there, and unpacks those again that are not. Several may
 *   start at once: a file is complete before it gets its name.
 * - The directory must belong to the user, and nobody else may be able to write in it or to replace it.
 * - While the program runs, the directory is locked (flock), so that systemd-tmpfiles leaves it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <zlib.h>

struct file {
    const char *name;
    off_t size;
};

#include "payload.h"

#define COUNT (sizeof files / sizeof *files)
#define CANNOT_EXECUTE 126 /* as a shell exits with where it cannot execute a program */

__asm__(".section .rodata\npayload: .incbin \"payload\"\npayload_end:\n.previous");
extern const unsigned char payload[], payload_end[];

/* Where to unpack: in the value of a variable, or in a directory for all users. The directory that is
 * shared with other users has the user's id in its name. */
static const struct {
    const char *variable, *fallback, *format;
} places[] = {
    {"CACHE_DIRECTORY", NULL, "%s/sseserve"}, /* systemd.exec(5): CacheDirectory= */
    {"XDG_CACHE_HOME", NULL, "%s/sseserve"},
    {"HOME", NULL, "%s/.cache/sseserve"},
    {"TMPDIR", NULL, "%s/sseserve-%u"},
    {NULL, "/tmp", "%s/sseserve-%u"},
    {NULL, "/var/tmp", "%s/sseserve-%u"},
};

static char reasons[8192]; /* why no place could be used, a line for each */

static int refuse(const char *path, const char *reason) {
    size_t used = strlen(reasons);
    snprintf(reasons + used, sizeof reasons - used, "  %s: %s\n", path, reason);
    return 0;
}

/* Create the directories of a path that come behind its first `given` bytes. */
static int make_directories(const char *path, size_t given) {
    char part[4096];
    for (size_t end = given + 1; end <= strlen(path); end++) {
        if (path[end] != '/' && path[end] != 0) continue;
        snprintf(part, sizeof part, "%.*s", (int)end, path);
        if (mkdir(part, 0700) != 0 && errno != EEXIST) return refuse(part, strerror(errno));
    }
    return 1;
}

static int is_complete(const char *directory, const struct file *file) {
    char path[4096];
    struct stat found;
    snprintf(path, sizeof path, "%s/%s", directory, file->name);
    return lstat(path, &found) == 0 && S_ISREG(found.st_mode) && found.st_size == file->size;
}

static int write_file(const char *directory, const struct file *file, const unsigned char *content) {
    char path[4096], temporary[4112];
    snprintf(path, sizeof path, "%s/%s", directory, file->name);
    snprintf(temporary, sizeof temporary, "%s.new-XXXXXX", path);
    *strrchr(path, '/') = 0;
    if (!make_directories(path, strlen(directory))) return 0;
    path[strlen(path)] = '/';
    int target = mkstemp(temporary);
    if (target < 0) return refuse(directory, strerror(errno));
    off_t written = 0;
    while (written < file->size) {
        ssize_t count = write(target, content + written, file->size - written);
        if (count < 0) break;
        written += count;
    }
    int is_written = written == file->size && fchmod(target, 0500) == 0;
    if (close(target) != 0 || !is_written || rename(temporary, path) != 0) {
        int error = errno;
        unlink(temporary);
        return refuse(directory, strerror(error));
    }
    return 1;
}

static int unpack(const char *directory) {
    static unsigned char *contents;
    size_t number = 0;
    while (number < COUNT && is_complete(directory, &files[number])) number++;
    if (number == COUNT) return 1;
    uLongf size = UNPACKED_SIZE;
    if (contents == NULL) {
        contents = malloc(size);
        if (contents == NULL) return refuse(directory, strerror(ENOMEM));
        if (uncompress(contents, &size, payload, payload_end - payload) != Z_OK)
            return refuse(directory, "this file is damaged");
    }
    const unsigned char *content = contents;
    for (number = 0; number < COUNT; content += files[number++].size)
        if (!is_complete(directory, &files[number]) && !write_file(directory, &files[number], content)) return 0;
    return 1;
}

/* Whether nobody but the user can replace what is in `base` and belongs to the user. */
static int is_safe(const char *base) {
    struct stat found;
    if (stat(base, &found) != 0) return refuse(base, strerror(errno));
    if (!S_ISDIR(found.st_mode)) return refuse(base, strerror(ENOTDIR));
    if (found.st_uid != geteuid() && found.st_uid != 0) return refuse(base, "belongs to another user");
    /* Where others can write they must not rename what is not theirs: the sticky bit of /tmp. */
    if (found.st_mode & (S_IWGRP | S_IWOTH) && !(found.st_mode & S_ISVTX))
        return refuse(base, "can be changed by other users");
    return 1;
}

/* Prepare a directory of this build. */
static int prepare(const char *base, const char *format, char *directory, size_t size) {
    struct stat found;
    struct statvfs system;
    if (!is_safe(base)) return 0;
    snprintf(directory, size, format, base, (unsigned)geteuid());
    if (!make_directories(directory, strlen(base))) return 0;
    if (lstat(directory, &found) != 0) return refuse(directory, strerror(errno));
    if (!S_ISDIR(found.st_mode) || found.st_uid != geteuid() || found.st_mode & (S_IWGRP | S_IWOTH))
        return refuse(directory, "is not a directory that only this user can write");
    if (statvfs(directory, &system) == 0 && system.f_flag & ST_NOEXEC)
        return refuse(directory, "is on a file system without programs (noexec)");
    size_t used = strlen(directory);
    snprintf(directory + used, size - used, "/" BUILD);
    if (!make_directories(directory, used)) return 0;
    int lock = open(directory, O_RDONLY | O_DIRECTORY); /* stays open in the program */
    if (lock >= 0) flock(lock, LOCK_SH | LOCK_NB);
    return unpack(directory);
}

/* Become the program. PyInstaller's bootloader in it needs a zlib, which the machine may not have. */
static void execute(const char *directory, char **arguments) {
    char program[4096], libraries[8192];
    const char *others = getenv("LD_LIBRARY_PATH");
    if (others != NULL && *others == 0) others = NULL; /* behind a colon it would be the current directory */
    snprintf(program, sizeof program, "%s/sseserve", directory);
    snprintf(libraries, sizeof libraries, "%s/_internal%s%s", directory, others ? ":" : "", others ? others : "");
    setenv("LD_LIBRARY_PATH", libraries, 1);
    arguments[0] = program; /* where there is no /proc, it tells the program where its files are */
    execv(program, arguments);
    refuse(program, errno == ENOENT ? "needs glibc, which is not installed" : strerror(errno));
}

int main(int count, char **arguments) {
    (void)count;
    for (size_t number = 0; number < sizeof places / sizeof *places; number++) {
        char base[2048], directory[3072];
        const char *given = places[number].fallback;
        if (places[number].variable != NULL) given = getenv(places[number].variable);
        if (given == NULL || *given != '/') continue;
        snprintf(base, sizeof base, "%.*s", (int)strcspn(given, ":"), given);
        if (prepare(base, places[number].format, directory, sizeof directory)) execute(directory, arguments);
    }
    fprintf(stderr,
            "sseserve: cannot unpack its files (%d MB):\n%s"
            "Set TMPDIR to a directory of a file system that may be written to, and has programs.\n",
            UNPACKED_SIZE / 1000000, reasons);
    return CANNOT_EXECUTE;
}
