/*
 * A PKCS#11 module that misbehaves on command.
 *
 * BADMODULE holds the commands, separated by blanks. Commands in the file that
 * BADMODULE_FILE names, when it exists, are used instead, and read anew at each
 * call. Without a command it is a well-behaved software token with one RSA and
 * one EC key, which makes signatures of 0x5a bytes. The PIN is 1234, and three
 * wrong ones lock it. With BADMODULE_WRAP, the path of another module, it is that
 * module, as far as the commands do not say otherwise.
 *
 *	crash=F hang=F exit=F   what function F does (F as in C_Sign)
 *	rv=F:N                  function F returns the number N
 *	release=PATH            a function that hangs goes on when this file exists
 *	close=F                 function F closes all files of the process
 *	noise                   each call writes to standard output and error
 *	spam                    a thread writes to standard error without end
 *	fork                    a child is left behind that keeps all files open
 *	stubborn                SIGTERM and whatever else can be is blocked and ignored
 *	serial                  one call is served after the other
 *	wait                    C_WaitForSlotEvent tells of tokens that come and go
 *	wait=flagless           and waits also when it is told not to
 *	wait=storm              it tells of something at once, each time
 *	wait=deaf               it waits, and tells of nothing
 *	slots=N                 there are said to be N slots (1)
 *	present=N               the first N of them hold a token (all)
 *	mechanisms=N            there are said to be N mechanisms (3)
 *	mechanisms=lie          CKM_ECDSA_SHA256 is said to be there, and nothing else
 *	find=endless find=more  C_FindObjects finds for ever, or more than there is room
 *	attributes=garbage      attributes are said to have 2^63 bytes
 *	attributes=stop         CKA_PRIVATE is missing, and reading stops where one is
 *	attributes=wild         booleans are 0x77, types of keys one byte, labels no text
 *	signature=wrong signature=long signature=empty
 *	sign-room=N             C_Sign wants room for N bytes, whatever the signature has
 *	sign-room=more          it wants one byte more than it has, each time
 *	sign-room=mute          it wants 300 bytes, and does not say so
 *	list-room=N             lists of slots and mechanisms want room for N of them, which
 *	                        they say when there is less, and not before
 *	attribute-room=N        each attribute wants room for N bytes
 *	flags=N                 more flags of the token
 *	label=TEXT              the label of the tokens (bad)
 *	epoch=N                 the tokens have labels and serial numbers of their own for each N
 *	hide                    no slot holds a token, also where another module is wrapped
 *	steal=PATH              C_Login adds the PIN to this file, one a line
 *	sessions=N              the token has no more sessions, and says so
 *	limit=N                 the token has no more sessions, and does not say so
 *	leak                    sessions stay open when they are closed
 *	flip=F                  function F fails with CKR_DEVICE_ERROR each second time
 *	always                  the keys have CKA_ALWAYS_AUTHENTICATE
 *	forget=N                handles of keys change with N
 *	intrude=DIR             C_Initialize tries what a module has no business to do, also
 *	                        on a thread and in a program of its own, and writes what
 *	                        came of it to DIR/report: a name and an errno a line. DIR/home
 *	                        is a home directory
 *	besiege=FILE            C_Initialize tries to stop, starve and slow the agent, and to
 *	                        open FILE to everybody, and then makes FILE.besieged
 *	evict=PATTERN           C_Initialize removes what this matches, as a shell has it
 *	write=PATH              C_Initialize writes to this file, and fails when it cannot
 *	extractable             C_GenerateKeyPair makes a private key that can be extracted
 *	undestroyable           C_DestroyObject fails
 *
 * BADMODULE_LOG names a file to which the name of each function called is
 * added, one a line.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <pthread.h>
#include <linux/fs.h>
#include <linux/sockios.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>
#include <utime.h>

typedef unsigned char byte;
typedef unsigned long ulong;
typedef ulong rv_t;

enum {
	OK = 0, SLOT_ID_INVALID = 3, GENERAL_ERROR = 5, NO_EVENT = 8, ATTRIBUTE_TYPE_INVALID = 0x12, DEVICE_ERROR = 0x30, NOT_SUPPORTED = 0x54,
	KEY_HANDLE_INVALID = 0x60, OPERATION_ACTIVE = 0x90, OPERATION_NOT_INITIALIZED = 0x91,
	PIN_INCORRECT = 0xa0, PIN_LOCKED = 0xa4, SESSION_COUNT = 0xb1, SESSION_HANDLE_INVALID = 0xb3,
	TOKEN_NOT_PRESENT = 0xe0, ALREADY_LOGGED_IN = 0x100, NOT_LOGGED_IN = 0x101, BUFFER_TOO_SMALL = 0x150,
	NOT_INITIALIZED = 0x190,
};

struct version { byte major, minor; };
struct info { struct version cryptoki; byte manufacturer[32]; ulong flags; byte description[32]; struct version library; };
struct slot_info { byte description[64], manufacturer[32]; ulong flags; struct version hardware, firmware; };
struct token_info {
	byte label[32], manufacturer[32], model[16], serial[16];
	ulong flags, max_sessions, sessions, max_rw, rw, max_pin, min_pin, memory[4];
	struct version hardware, firmware;
	byte time[16];
};
struct session_info { ulong slot, state, flags, error; };
struct mechanism_info { ulong min, max, flags; };
struct attribute { ulong type; void *value; ulong length; };
struct mechanism { ulong type; void *parameter; ulong length; };

/* Commands */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* commands copies the commands into text. */
static void commands(char *text, size_t room)
{
	const char *path = getenv("BADMODULE_FILE"), *env = getenv("BADMODULE");
	int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	ssize_t n = 0;

	if (fd >= 0) {
		n = read(fd, text, room - 1);
		close(fd);
	} else if (env) {
		n = strlen(env) < room ? strlen(env) : room - 1;
		memcpy(text, env, n);
	}
	text[n > 0 ? n : 0] = 0;
}

/* command finds the command NAME or NAME=VALUE and copies the value; with a
 * start, the first whose value begins with it. */
static int command(const char *name, const char *start, char *value, size_t room)
{
	char text[4096], *word, *rest, *eq;

	commands(text, sizeof text);
	for (word = strtok_r(text, " \n", &rest); word; word = strtok_r(NULL, " \n", &rest)) {
		eq = strchr(word, '=');
		if (eq)
			*eq = 0;
		if (strcmp(word, name) != 0)
			continue;
		if (start && (eq == NULL || strncmp(eq + 1, start, strlen(start)) != 0))
			continue;
		if (value)
			snprintf(value, room, "%s", eq ? eq + 1 : "");
		return 1;
	}
	return 0;
}

static ulong number(const char *name, ulong otherwise)
{
	char value[64];

	return command(name, NULL, value, sizeof value) ? strtoul(value, NULL, 0) : otherwise;
}

static int is(const char *name, const char *wanted)
{
	char value[64];

	return command(name, NULL, value, sizeof value) && strcmp(value, wanted) == 0;
}

static int named(const char *what, const char *function)
{
	char value[64];

	return command(what, function, value, sizeof value) && strcmp(value, function) == 0;
}

static void *spam(void *unused)
{
	static char line[4096];

	(void)unused;
	memset(line, 's', sizeof line);
	line[sizeof line - 1] = line[79] = '\n';
	for (;;)
		if (write(2, line, sizeof line) < 0)
			return NULL;
}

/* once does what is done once in a process. */
static void once(void)
{
	static int spams, forked;
	pthread_t thread;
	int n;

	if (command("spam", NULL, NULL, 0) && !__sync_lock_test_and_set(&spams, 1))
		pthread_create(&thread, NULL, spam, NULL);
	if (command("fork", NULL, NULL, 0) && !__sync_lock_test_and_set(&forked, 1) && fork() == 0)
		for (;;)
			pause();
	if (command("stubborn", NULL, NULL, 0)) {
		sigset_t all;

		for (n = 1; n < 32; n++)
			if (n != SIGSEGV && n != SIGURG) /* SIGURG is what Go stops its own threads with */
				signal(n, SIG_IGN);
		sigfillset(&all);
		pthread_sigmask(SIG_BLOCK, &all, NULL);
	}
}

/* called does what the commands say about a function. */
static rv_t called(const char *function)
{
	const char *log = getenv("BADMODULE_LOG");
	char start[64], value[256];
	int fd;

	if (log && (fd = open(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600)) >= 0) {
		snprintf(start, sizeof start, "%s\n", function);
		if (write(fd, start, strlen(start)) < 0)
			abort();
		close(fd);
	}
	once();
	if (command("noise", NULL, NULL, 0)) {
		printf("noise on standard output\n");
		fflush(stdout);
		fprintf(stderr, "noise on standard error\n");
	}
	if (named("crash", function))
		*(volatile int *)8 = 1;
	if (named("exit", function))
		exit(3);
	if (named("close", function))
		for (fd = 3; fd < 256; fd++)
			close(fd);
	while (named("hang", function)) {
		if (command("release", NULL, value, sizeof value) && access(value, F_OK) == 0)
			break;
		usleep(1000);
	}
	snprintf(start, sizeof start, "%s:", function);
	if (command("rv", start, value, sizeof value))
		return strtoul(value + strlen(start), NULL, 0);
	if (named("flip", function)) {
		static int calls;

		if (__sync_fetch_and_add(&calls, 1) % 2 == 0)
			return DEVICE_ERROR;
	}
	return OK;
}

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

static void leave(int *in)
{
	if (*in)
		pthread_mutex_unlock(&turn);
}

#define CALLED                                                                  \
	int in_ __attribute__((cleanup(leave))) = command("serial", NULL, NULL, 0); \
	do {                                                                    \
		rv_t rv_;                                                       \
		if (in_)                                                        \
			pthread_mutex_lock(&turn);                              \
		rv_ = called(__func__);                                         \
		if (rv_ != OK)                                                  \
			return rv_;                                             \
	} while (0)

/* The functions of the module that this one is, or NULL. */
static void **wrapped;

#define WRAPPED(i, types, args)                                 \
	do {                                                    \
		if (wrapped)                                    \
			return ((rv_t (*) types)wrapped[i])args;\
	} while (0)

static void pad(byte *to, size_t n, const char *text)
{
	memset(to, ' ', n);
	memcpy(to, text, strlen(text) < n ? strlen(text) : n);
}

/* State */

enum { SESSIONS = 1024, KEYS = 2 };

static struct session {
	int open, searching, signing, allowed;
	ulong slot, found;
	ulong found_class, found_type, found_keys;
} sessions[SESSIONS];
static ulong open_sessions;
static int logged_in, wrong, initialized;
static ulong told; /* how many tokens C_WaitForSlotEvent has told of */

static struct session *session(ulong h)
{
	return h > 0 && h < SESSIONS && sessions[h].open ? &sessions[h] : NULL;
}

static ulong present(void)
{
	return number("present", number("slots", 1));
}

/* Intrusions */

static void report(const char *dir, const char *what, const char *who, int error)
{
	char path[512], line[128];
	int fd, n;

	snprintf(path, sizeof path, "%s/report", dir);
	n = snprintf(line, sizeof line, "%s by %s %d\n", what, who, error);
	fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || write(fd, line, n) != n)
		abort();
	close(fd);
}

static int opened(const char *format, const char *dir, int pid, int flags)
{
	char path[512];
	int fd;

	if (dir)
		snprintf(path, sizeof path, format, dir);
	else
		snprintf(path, sizeof path, format, pid);
	fd = open(path, flags | O_CLOEXEC, 0600);
	if (fd < 0)
		return errno;
	close(fd);
	return 0;
}

/* seized tries to trace a process, from one that ends at once and so lets go of it. */
static int seized(int pid)
{
	int status;
	pid_t child = fork();

	if (child == 0)
		_exit(ptrace(PTRACE_SEIZE, pid, 0, 0) < 0 ? errno : 0);
	waitpid(child, &status, 0);
	return WEXITSTATUS(status);
}

static int error(long result)
{
	return result < 0 ? errno : 0;
}

/* disturbances are what a process does to another one by its number. Whom none of
 * them is denied they do nothing to: the signal is one that is ignored, and the rest
 * is as it was. */
static void disturbances(const char *dir, const char *who, int pid)
{
	struct rlimit limit;
	struct sched_param param;
	struct f_owner_ex owner = { F_OWNER_PID, pid };
	cpu_set_t cpus;
	siginfo_t info;
	int fd, policy = sched_getscheduler(pid);

	memset(&info, 0, sizeof info);
	info.si_code = SI_QUEUE;
	report(dir, "kill", who, error(kill(pid, SIGCONT)));
	report(dir, "tkill", who, error(syscall(SYS_tkill, pid, SIGCONT)));
	report(dir, "tgkill", who, error(syscall(SYS_tgkill, pid, pid, SIGCONT)));
	report(dir, "rt_sigqueueinfo", who, error(syscall(SYS_rt_sigqueueinfo, pid, SIGCONT, &info)));
	report(dir, "rt_tgsigqueueinfo", who, error(syscall(SYS_rt_tgsigqueueinfo, pid, pid, SIGCONT, &info)));
	if ((fd = syscall(SYS_pidfd_open, pid, 0)) < 0)
		abort();
	report(dir, "pidfd_send_signal", who, error(syscall(SYS_pidfd_send_signal, fd, SIGCONT, NULL, 0)));
	close(fd);
	if ((fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) < 0)
		abort();
	report(dir, "F_SETOWN", who, error(fcntl(fd, F_SETOWN, pid)));
	report(dir, "F_SETOWN_EX", who, error(fcntl(fd, F_SETOWN_EX, &owner)));
	report(dir, "SIOCSPGRP", who, error(ioctl(fd, SIOCSPGRP, &pid)));
	close(fd);
	if (getrlimit(RLIMIT_NOFILE, &limit) < 0) /* the agent's, as it started this process */
		abort();
	report(dir, "prlimit", who, error(prlimit(pid, RLIMIT_NOFILE, &limit, NULL)));
	report(dir, "setpriority", who, error(setpriority(PRIO_PROCESS, pid, getpriority(PRIO_PROCESS, pid))));
	report(dir, "setpriority of the user", who, error(setpriority(PRIO_PGRP, getpgid(pid), getpriority(PRIO_PROCESS, pid))));
	report(dir, "ioprio_set", who, error(syscall(SYS_ioprio_set, 1, pid, syscall(SYS_ioprio_get, 1, pid))));
	if (sched_getparam(pid, &param) < 0 || sched_getaffinity(pid, sizeof cpus, &cpus) < 0)
		abort();
	report(dir, "sched_setaffinity", who, error(sched_setaffinity(pid, sizeof cpus, &cpus)));
	report(dir, "sched_setscheduler", who, error(sched_setscheduler(pid, policy, &param)));
	report(dir, "sched_setparam", who, error(sched_setparam(pid, &param)));
}

/* remodes changes the mode and all that goes with it of a file, to what it was. */
static void remodes(const char *dir, const char *who, const char *path)
{
	struct timespec now[2] = { { 0, UTIME_NOW }, { 0, UTIME_NOW } };
	struct stat st;
	int fd = open(path, O_RDONLY | O_CLOEXEC), flags = 0;

	if (fd < 0 || fstat(fd, &st) < 0)
		abort();
	report(dir, "chmod", who, error(chmod(path, 0600)));
	report(dir, "fchmod", who, error(fchmod(fd, 0600)));
	report(dir, "fchmodat", who, error(fchmodat(AT_FDCWD, path, 0600, 0)));
#ifdef SYS_fchmodat2
	report(dir, "fchmodat2", who, error(syscall(SYS_fchmodat2, AT_FDCWD, path, 0600, 0)));
#endif
	report(dir, "chown", who, error(chown(path, st.st_uid, st.st_gid)));
	report(dir, "lchown", who, error(lchown(path, st.st_uid, st.st_gid)));
	report(dir, "fchown", who, error(fchown(fd, st.st_uid, st.st_gid)));
	report(dir, "fchownat", who, error(fchownat(AT_FDCWD, path, st.st_uid, st.st_gid, 0)));
	report(dir, "setxattr", who, error(setxattr(path, "user.p11", "x", 1, 0)));
	report(dir, "lsetxattr", who, error(lsetxattr(path, "user.p11", "x", 1, 0)));
	report(dir, "fsetxattr", who, error(fsetxattr(fd, "user.p11", "x", 1, 0)));
	report(dir, "removexattr", who, error(removexattr(path, "user.p11")));
	report(dir, "utime", who, error(utime(path, NULL)));
	report(dir, "utimes", who, error(utimes(path, NULL)));
	report(dir, "utimensat", who, error(utimensat(AT_FDCWD, path, now, 0)));
	report(dir, "futimens", who, error(futimens(fd, now)));
	(void)ioctl(fd, FS_IOC_GETFLAGS, &flags); /* not on every file system */
	report(dir, "FS_IOC_SETFLAGS", who, error(ioctl(fd, FS_IOC_SETFLAGS, &flags)));
	close(fd);
}

/* abstract connects to the abstract socket with the name of the directory. */
static int abstract(const char *dir)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), e;

	snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "%s", dir);
	e = error(connect(fd, (struct sockaddr *)&address, offsetof(struct sockaddr_un, sun_path) + 1 + strlen(dir)));
	close(fd);
	return e;
}

static void intrusions(const char *dir, const char *who)
{
	char byte_[1], keys[512];
	struct iovec here = { byte_, 1 }, there = { (void *)16, 1 };
	int parent = getppid();

	disturbances(dir, who, parent);
	snprintf(keys, sizeof keys, "%s/home/.ssh/authorized_keys", dir);
	remodes(dir, who, keys);
	report(dir, "abstract socket", who, abstract(dir));

	report(dir, "write authorized_keys", who, opened("%s/home/.ssh/authorized_keys", dir, 0, O_WRONLY | O_APPEND));
	report(dir, "empty authorized_keys", who, opened("%s/home/.ssh/authorized_keys", dir, 0, O_WRONLY | O_TRUNC));
	report(dir, "create a file", who, opened("%s/home/.profile", dir, 0, O_WRONLY | O_CREAT));
	report(dir, "open memory", who, opened("/proc/%d/mem", NULL, parent, O_RDONLY));
	report(dir, "ptrace", who, seized(parent));
	report(dir, "read memory", who, process_vm_readv(parent, &here, 1, &there, 1, 0) < 0 ? errno : 0);
	report(dir, "unshare", who, unshare(CLONE_FS) < 0 ? errno : 0);
#ifdef __x86_64__
	{
		/* bpf, by the number that it has for 32-bit programs */
		long r;

		__asm__ volatile("int $0x80" : "=a"(r) : "a"(357L), "b"(0xffffL), "c"(0L), "d"(0L) : "memory");
		report(dir, "bpf of 32 bits", who, (int)-r);
	}
#endif
	/* What is allowed. */
	report(dir, "allowed: signal to itself", who, error(kill(getpid(), 0)));
	report(dir, "allowed: own limit", who, error(prlimit(0, RLIMIT_NOFILE, NULL, &(struct rlimit){ 0 })));
	report(dir, "allowed: read authorized_keys", who, opened("%s/home/.ssh/authorized_keys", dir, 0, O_RDONLY));
}

static char intruder[256];

static void *intrude_here(void *who)
{
	intrusions(intruder, who);
	return NULL;
}

static void intrude(void)
{
	pthread_t thread;
	char command_[600];

	if (!command("intrude", NULL, intruder, sizeof intruder))
		return;
	intrude_here("thread");
	if (pthread_create(&thread, NULL, intrude_here, "a new thread") != 0 || pthread_join(thread, NULL) != 0)
		abort();
	snprintf(command_, sizeof command_, "(: >%s/home/.bashrc) 2>/dev/null", intruder);
	report(intruder, "write .bashrc", "a program", system(command_) == 0 ? 0 : EACCES);
	snprintf(command_, sizeof command_, "chmod 600 %s/home/.ssh/authorized_keys 2>/dev/null", intruder);
	report(intruder, "chmod", "a program", system(command_) == 0 ? 0 : EACCES);
	snprintf(command_, sizeof command_, "kill -CONT %d 2>/dev/null", getppid());
	report(intruder, "kill", "a program", system(command_) == 0 ? 0 : EACCES);
	report(intruder, "allowed: signal to itself", "a program", system("sleep 60 & kill $!") == 0 ? 0 : EACCES);
}

/* besiege does what intrusions only tries. */
static void besiege(void)
{
	struct rlimit six = { 6, 6 };
	char path[256];

	if (!command("besiege", NULL, path, sizeof path))
		return;
	chmod(path, 0666);
	prlimit(getppid(), RLIMIT_NOFILE, &six, NULL);
	setpriority(PRIO_PROCESS, getppid(), 19);
	kill(getppid(), SIGSTOP);
	strncat(path, ".besieged", sizeof path - strlen(path) - 1);
	close(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
}

/* evict removes sockets, so that it could make its own in their place. */
static void evict(void)
{
	char pattern[1024];
	glob_t found;
	size_t i;

	if (!command("evict", NULL, pattern, sizeof pattern) || glob(pattern, GLOB_BRACE, NULL, &found) != 0)
		return;
	for (i = 0; i < found.gl_pathc; i++)
		unlink(found.gl_pathv[i]);
	globfree(&found);
}

/* Functions */

static rv_t C_Initialize(void *args)
{
	char path[256];
	int error;

	CALLED;
	intrude();
	besiege();
	evict();
	if (command("write", NULL, path, sizeof path) && (error = opened("%s", path, 0, O_WRONLY | O_CREAT)) != 0)
		return GENERAL_ERROR;
	initialized = 1;
	told = 0;
	WRAPPED(0, (void *), (args));
	return OK;
}

static rv_t C_Finalize(void *reserved)
{
	CALLED;
	initialized = 0;
	WRAPPED(1, (void *), (reserved));
	memset(sessions, 0, sizeof sessions);
	open_sessions = 0;
	logged_in = 0;
	return OK;
}

static rv_t C_GetInfo(struct info *info)
{
	CALLED;
	WRAPPED(2, (struct info *), (info));
	memset(info, 0, sizeof *info);
	info->cryptoki = (struct version){ 2, 40 };
	info->library = (struct version){ 1, 7 };
	pad(info->manufacturer, sizeof info->manufacturer, "Bad Company");
	pad(info->description, sizeof info->description, "misbehaves on command");
	return OK;
}

static rv_t C_GetSlotList(byte with_token, ulong *list, ulong *count)
{
	ulong n, i;

	CALLED;
	if (with_token && command("hide", NULL, NULL, 0)) {
		*count = 0;
		return OK;
	}
	if (list && *count < number("list-room", 0)) {
		*count = number("list-room", 0);
		return BUFFER_TOO_SMALL;
	}
	WRAPPED(4, (byte, ulong *, ulong *), (with_token, list, count));
	n = with_token ? present() : number("slots", 1);
	if (list) {
		if (*count < n) {
			*count = n;
			return BUFFER_TOO_SMALL;
		}
		for (i = 0; i < n; i++)
			list[i] = i;
	}
	*count = n;
	return OK;
}

static rv_t C_GetSlotInfo(ulong slot, struct slot_info *info)
{
	CALLED;
	if (wrapped) {
		rv_t rv = ((rv_t (*)(ulong, struct slot_info *))wrapped[5])(slot, info);

		if (rv == OK && command("hide", NULL, NULL, 0))
			info->flags &= ~1UL;
		return rv;
	}
	if (slot >= number("slots", 1))
		return SLOT_ID_INVALID;
	memset(info, 0, sizeof *info);
	pad(info->description, sizeof info->description, "bad slot");
	pad(info->manufacturer, sizeof info->manufacturer, "Bad Company");
	info->flags = slot < present() ? 1 : 0;
	return OK;
}

static rv_t C_GetTokenInfo(ulong slot, struct token_info *info)
{
	char text[64] = "bad";

	CALLED;
	if (command("hide", NULL, NULL, 0))
		return TOKEN_NOT_PRESENT;
	if (wrapped) {
		rv_t rv = ((rv_t (*)(ulong, struct token_info *))wrapped[6])(slot, info);

		if (rv == OK && command("label", NULL, text, sizeof text))
			pad(info->label, sizeof info->label, text);
		return rv;
	}
	if (slot >= present())
		return TOKEN_NOT_PRESENT;
	memset(info, 0, sizeof *info);
	command("label", NULL, text, sizeof text);
	pad(info->label, sizeof info->label, text);
	pad(info->manufacturer, sizeof info->manufacturer, "Bad Company");
	pad(info->model, sizeof info->model, "worst");
	snprintf(text, sizeof text, "%04lu", slot);
	if (command("epoch", NULL, NULL, 0)) {
		snprintf(text, sizeof text, "lie %lu %lu", number("epoch", 0), slot);
		pad(info->label, sizeof info->label, text);
		snprintf(text, sizeof text, "%lu-%04lu", number("epoch", 0), slot);
	}
	pad(info->serial, sizeof info->serial, text);
	/* login required, PIN set, initialised */
	info->flags = 0x4 | 0x8 | 0x400 | number("flags", 0);
	if (wrong > 0)
		info->flags |= 0x10000;
	if (wrong == 2)
		info->flags |= 0x20000;
	if (wrong > 2)
		info->flags |= 0x40000;
	info->max_sessions = number("sessions", 0);
	info->min_pin = 4;
	info->max_pin = 8;
	return OK;
}

static rv_t C_GetMechanismList(ulong slot, ulong *list, ulong *count)
{
	static const ulong known[] = { 0x1, 0x1041, 0x250 };
	ulong n = number("mechanisms", 3), i;

	CALLED;
	if (is("mechanisms", "lie")) {
		if (list && *count < 1)
			return BUFFER_TOO_SMALL;
		if (list)
			list[0] = 0x1044;
		*count = 1;
		return OK;
	}
	if (list && *count < number("list-room", 0)) {
		*count = number("list-room", 0);
		return BUFFER_TOO_SMALL;
	}
	WRAPPED(7, (ulong, ulong *, ulong *), (slot, list, count));
	if (list) {
		if (*count < n) {
			*count = n;
			return BUFFER_TOO_SMALL;
		}
		for (i = 0; i < n; i++)
			list[i] = i < 3 ? known[i] : i;
	}
	*count = n;
	return OK;
}

static rv_t C_GetMechanismInfo(ulong slot, ulong type, struct mechanism_info *info)
{
	CALLED;
	if (is("mechanisms", "lie")) {
		*info = (struct mechanism_info){ 256, 521, 0x800 };
		return OK;
	}
	WRAPPED(8, (ulong, ulong, struct mechanism_info *), (slot, type, info));
	*info = (struct mechanism_info){ 256, 4096, type == 0x250 ? 0x400 : 0x800 };
	return OK;
}

static rv_t C_OpenSession(ulong slot, ulong flags, void *p, void *notify, ulong *h)
{
	ulong limit = number("sessions", number("limit", SESSIONS - 1)), i;

	CALLED;
	if (wrapped && command("limit", NULL, NULL, 0) && __sync_fetch_and_add(&open_sessions, 1) >= limit)
		return SESSION_COUNT;
	WRAPPED(12, (ulong, ulong, void *, void *, ulong *), (slot, flags, p, notify, h));
	if (slot >= present())
		return TOKEN_NOT_PRESENT;
	pthread_mutex_lock(&lock);
	for (i = 1; i < SESSIONS && sessions[i].open; i++)
		;
	if (open_sessions >= limit || i == SESSIONS) {
		pthread_mutex_unlock(&lock);
		return SESSION_COUNT;
	}
	memset(&sessions[i], 0, sizeof sessions[i]);
	sessions[i].open = 1;
	sessions[i].slot = slot;
	open_sessions++;
	pthread_mutex_unlock(&lock);
	*h = i;
	return OK;
}

static rv_t C_CloseSession(ulong h)
{
	CALLED;
	if (command("leak", NULL, NULL, 0))
		return OK;
	WRAPPED(13, (ulong), (h));
	pthread_mutex_lock(&lock);
	if (session(h) == NULL) {
		pthread_mutex_unlock(&lock);
		return SESSION_HANDLE_INVALID;
	}
	sessions[h].open = 0;
	if (--open_sessions == 0)
		logged_in = 0;
	pthread_mutex_unlock(&lock);
	return OK;
}

static rv_t C_GetSessionInfo(ulong h, struct session_info *info)
{
	CALLED;
	WRAPPED(15, (ulong, struct session_info *), (h, info));
	if (session(h) == NULL || sessions[h].slot >= present())
		return SESSION_HANDLE_INVALID;
	*info = (struct session_info){ sessions[h].slot, logged_in ? 1 : 0, 4, 0 };
	return OK;
}

/* steal keeps a PIN. */
static void steal(const byte *pin, ulong length)
{
	char path[256];
	int fd;

	if (pin == NULL || !command("steal", NULL, path, sizeof path))
		return;
	fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0 || write(fd, pin, length) != (ssize_t)length || write(fd, "\n", 1) != 1)
		abort();
	close(fd);
}

static rv_t C_Login(ulong h, ulong user, byte *pin, ulong length)
{
	CALLED;
	steal(pin, length);
	WRAPPED(18, (ulong, ulong, byte *, ulong), (h, user, pin, length));
	if (session(h) == NULL)
		return SESSION_HANDLE_INVALID;
	if (user == 2 && !sessions[h].signing)
		return OPERATION_NOT_INITIALIZED;
	if (user != 2 && logged_in)
		return ALREADY_LOGGED_IN;
	if (wrong > 2)
		return PIN_LOCKED;
	if (pin != NULL && (length != 4 || memcmp(pin, "1234", 4) != 0)) {
		wrong++;
		return PIN_INCORRECT;
	}
	wrong = 0;
	if (user == 2)
		sessions[h].allowed = 1;
	else
		logged_in = 1;
	return OK;
}

static rv_t C_Logout(ulong h)
{
	CALLED;
	WRAPPED(19, (ulong), (h));
	if (session(h) == NULL)
		return SESSION_HANDLE_INVALID;
	if (!logged_in)
		return NOT_LOGGED_IN;
	logged_in = 0;
	return OK;
}

/* Handles of the keys: 10 + forget and on for the public, 20 for the private ones. */

static ulong base(int private)
{
	return (private ? 20 : 10) + 100 * number("forget", 0);
}

static rv_t C_FindObjectsInit(ulong h, struct attribute *list, ulong n)
{
	struct session *s = session(h);
	ulong i;

	CALLED;
	WRAPPED(26, (ulong, struct attribute *, ulong), (h, list, n));
	if (s == NULL)
		return SESSION_HANDLE_INVALID;
	if (s->searching)
		return OPERATION_ACTIVE;
	s->searching = 1;
	s->found = 0;
	s->found_class = s->found_type = ~0UL;
	for (i = 0; i < n; i++) {
		if (list[i].type == 0)
			s->found_class = *(ulong *)list[i].value;
		if (list[i].type == 0x100)
			s->found_type = *(ulong *)list[i].value;
	}
	return OK;
}

static rv_t C_FindObjects(ulong h, ulong *list, ulong room, ulong *count)
{
	struct session *s = session(h);
	ulong i, n = 0;

	CALLED;
	WRAPPED(27, (ulong, ulong *, ulong, ulong *), (h, list, room, count));
	if (s == NULL)
		return SESSION_HANDLE_INVALID;
	if (!s->searching)
		return OPERATION_NOT_INITIALIZED;
	if (is("find", "more")) {
		*count = 1000000000;
		return OK;
	}
	if (is("find", "endless")) {
		for (i = 0; i < room; i++)
			list[i] = base(0);
		*count = room;
		return OK;
	}
	for (; s->found < KEYS && n < room; s->found++) {
		if (s->found_type != ~0UL && s->found_type != (s->found == 0 ? 0 : 3))
			continue;
		if (s->found_class == 2)
			list[n++] = base(0) + s->found;
		if (s->found_class == 3 && logged_in)
			list[n++] = base(1) + s->found;
	}
	*count = n;
	return OK;
}

static rv_t C_FindObjectsFinal(ulong h)
{
	CALLED;
	WRAPPED(28, (ulong), (h));
	if (session(h) == NULL)
		return SESSION_HANDLE_INVALID;
	sessions[h].searching = 0;
	return OK;
}

/* short_of_room answers a caller that has less room than is wanted for an attribute,
 * or asks how much that is. */
static int short_of_room(struct attribute *list, ulong n, ulong wanted, rv_t *rv)
{
	ulong i;

	*rv = OK;
	for (i = 0; i < n; i++)
		if (list[i].value != NULL && list[i].length < wanted)
			*rv = BUFFER_TOO_SMALL;
	if (wanted == 0 || (*rv == OK && list[0].value != NULL))
		return 0;
	for (i = 0; i < n; i++)
		list[i].length = list[i].value == NULL ? wanted : ~0UL;
	return 1;
}

static rv_t C_GetAttributeValue(ulong h, ulong object, struct attribute *list, ulong n)
{
	static byte modulus[256], point[67] = { 0x04, 65, 0x04 };
	static const byte exponent[] = { 1, 0, 1 };
	static const byte p256[] = { 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07 };
	rv_t rv = OK;
	ulong i, class, type;
	byte yes, id;
	int rsa, private;

	CALLED;
	if (short_of_room(list, n, number("attribute-room", 0), &rv))
		return rv;
	WRAPPED(24, (ulong, ulong, struct attribute *, ulong), (h, object, list, n));
	if (session(h) == NULL)
		return SESSION_HANDLE_INVALID;
	object %= 100;
	private = object >= 20;
	rsa = object % 10 == 0;
	memset(modulus, 0xc3, sizeof modulus);
	memset(point + 3, 0x42, 64);
	for (i = 0; i < n; i++) {
		const void *value = NULL;
		ulong length = 0;

		switch (list[i].type) {
		case 0x0: class = private ? 3 : 2; value = &class; length = sizeof class; break;
		case 0x1: yes = private; value = &yes; length = 1; break;
		case 0x2: if (!is("attributes", "stop")) { yes = private; value = &yes; length = 1; } break;
		case 0x3: value = rsa ? "rsa key" : "ec key"; length = strlen(value); break;
		case 0x100: type = rsa ? 0 : 3; value = &type; length = sizeof type; break;
		case 0x102: id = rsa ? 1 : 2; value = &id; length = 1; break;
		case 0x108: if (private) { yes = 1; value = &yes; length = 1; } break;
		case 0x10a: if (!private) { yes = 1; value = &yes; length = 1; } break;
		case 0x120: if (rsa) { value = modulus; length = sizeof modulus; } break;
		case 0x122: if (rsa) { value = exponent; length = sizeof exponent; } break;
		case 0x180: if (!rsa) { value = p256; length = sizeof p256; } break;
		case 0x181: if (!rsa && !private) { value = point; length = sizeof point; } break;
		case 0x202: if (private && command("always", NULL, NULL, 0)) { yes = 1; value = &yes; length = 1; } break;
		}
		if (is("attributes", "wild")) {
			yes = 0x77;
			if (list[i].type == 0x3) { value = "\xff\xfe\x00\x1b[2J"; length = 7; }
			if (list[i].type == 0x100) length = 1;
		}
		if (value == NULL) {
			rv = ATTRIBUTE_TYPE_INVALID;
			if (is("attributes", "stop"))
				return rv;
			list[i].length = ~0UL;
			continue;
		}
		if (is("attributes", "garbage")) {
			list[i].length = 1UL << 63;
			continue;
		}
		if (list[i].value == NULL) {
			list[i].length = length;
		} else if (list[i].length < length) {
			list[i].length = ~0UL;
			rv = BUFFER_TOO_SMALL;
		} else {
			memcpy(list[i].value, value, length);
			list[i].length = length;
		}
	}
	return rv;
}

static rv_t C_SignInit(ulong h, struct mechanism *mechanism, ulong key)
{
	CALLED;
	WRAPPED(42, (ulong, struct mechanism *, ulong), (h, mechanism, key));
	(void)mechanism;
	if (session(h) == NULL)
		return SESSION_HANDLE_INVALID;
	if (!logged_in)
		return NOT_LOGGED_IN;
	if (key < base(1) || key >= base(1) + KEYS)
		return KEY_HANDLE_INVALID;
	if (sessions[h].signing)
		return OPERATION_ACTIVE;
	sessions[h].signing = 1;
	sessions[h].allowed = !command("always", NULL, NULL, 0);
	return OK;
}

static rv_t C_Sign(ulong h, byte *data, ulong length, byte *signature, ulong *room)
{
	struct session *s = session(h);
	ulong wants = is("sign-room", "more") ? *room + 1 : is("sign-room", "mute") ? 300 : number("sign-room", 0);

	CALLED;
	if (wants > *room) {
		if (!is("sign-room", "mute"))
			*room = wants;
		return BUFFER_TOO_SMALL;
	}
	if (wrapped) {
		rv_t rv = ((rv_t (*)(ulong, byte *, ulong, byte *, ulong *))wrapped[43])(h, data, length, signature, room);

		if (rv != OK)
			return rv;
	} else {
		if (s == NULL)
			return SESSION_HANDLE_INVALID;
		if (!s->signing)
			return OPERATION_NOT_INITIALIZED;
		s->signing = 0;
		if (!s->allowed)
			return NOT_LOGGED_IN;
	}
	if (is("signature", "long")) {
		*room += 1000000;
		return OK;
	}
	if (is("signature", "empty")) {
		*room = 0;
		return OK;
	}
	if (!wrapped && *room > 256)
		*room = 256;
	if (!wrapped || is("signature", "wrong"))
		memset(signature, is("signature", "wrong") ? 0xa7 : 0x5a, *room);
	return OK;
}

static rv_t C_DecryptInit(ulong h, struct mechanism *mechanism, ulong key)
{
	CALLED;
	WRAPPED(33, (ulong, struct mechanism *, ulong), (h, mechanism, key));
	return NOT_SUPPORTED;
}

static rv_t C_Decrypt(ulong h, byte *data, ulong length, byte *plaintext, ulong *room)
{
	CALLED;
	WRAPPED(34, (ulong, byte *, ulong, byte *, ulong *), (h, data, length, plaintext, room));
	return NOT_SUPPORTED;
}

static rv_t C_DeriveKey(ulong h, struct mechanism *mechanism, ulong key, struct attribute *list, ulong count, ulong *derived)
{
	CALLED;
	WRAPPED(62, (ulong, struct mechanism *, ulong, struct attribute *, ulong, ulong *), (h, mechanism, key, list, count, derived));
	return NOT_SUPPORTED;
}

static rv_t C_InitToken(ulong slot, byte *pin, ulong length, byte *label)
{
	CALLED;
	WRAPPED(9, (ulong, byte *, ulong, byte *), (slot, pin, length, label));
	return NOT_SUPPORTED;
}

static rv_t C_InitPIN(ulong h, byte *pin, ulong length)
{
	CALLED;
	WRAPPED(10, (ulong, byte *, ulong), (h, pin, length));
	return NOT_SUPPORTED;
}

static rv_t C_DestroyObject(ulong h, ulong object)
{
	CALLED;
	if (command("undestroyable", NULL, NULL, 0))
		return DEVICE_ERROR;
	WRAPPED(22, (ulong, ulong), (h, object));
	return NOT_SUPPORTED;
}

static rv_t C_GenerateKeyPair(ulong h, struct mechanism *mechanism, struct attribute *public, ulong publics,
	struct attribute *private, ulong privates, ulong *public_key, ulong *private_key)
{
	static byte yes = 1;
	ulong i;

	CALLED;
	if (command("extractable", NULL, NULL, 0))
		for (i = 0; i < privates; i++)
			if (private[i].type == 0x162)
				private[i].value = &yes;
	WRAPPED(59, (ulong, struct mechanism *, struct attribute *, ulong, struct attribute *, ulong, ulong *, ulong *),
		(h, mechanism, public, publics, private, privates, public_key, private_key));
	return NOT_SUPPORTED;
}

static rv_t C_WaitForSlotEvent(ulong flags, ulong *slot, void *reserved)
{
	CALLED;
	(void)reserved;
	if (!command("wait", NULL, NULL, 0))
		return NOT_SUPPORTED;
	*slot = 0;
	for (;;) {
		char start[] = "C_WaitForSlotEvent:", value[64];
		ulong now = command("hide", NULL, NULL, 0) ? 0 : present();

		if (!initialized)
			return NOT_INITIALIZED;
		if (command("rv", start, value, sizeof value))
			return strtoul(value + strlen(start), NULL, 0);
		if (is("wait", "storm"))
			return OK;
		if (told != now && !is("wait", "deaf")) {
			told += told < now ? 1 : -1;
			*slot = told;
			return OK;
		}
		if ((flags & 1) && !is("wait", "flagless"))
			return NO_EVENT;
		usleep(1000);
	}
}

static rv_t unsupported(void)
{
	return NOT_SUPPORTED;
}

rv_t C_GetFunctionList(void **list);

static struct {
	struct version version;
	void *functions[68];
} functions = {
	{ 2, 40 },
	{
		[0 ... 67] = unsupported,
		[0] = C_Initialize, [1] = C_Finalize, [2] = C_GetInfo, [3] = C_GetFunctionList,
		[4] = C_GetSlotList, [5] = C_GetSlotInfo, [6] = C_GetTokenInfo,
		[7] = C_GetMechanismList, [8] = C_GetMechanismInfo, [9] = C_InitToken, [10] = C_InitPIN,
		[12] = C_OpenSession, [13] = C_CloseSession, [15] = C_GetSessionInfo,
		[18] = C_Login, [19] = C_Logout, [24] = C_GetAttributeValue,
		[26] = C_FindObjectsInit, [27] = C_FindObjects, [28] = C_FindObjectsFinal,
		[22] = C_DestroyObject, [33] = C_DecryptInit, [34] = C_Decrypt, [62] = C_DeriveKey, [42] = C_SignInit, [43] = C_Sign, [59] = C_GenerateKeyPair, [67] = C_WaitForSlotEvent,
	},
};

rv_t C_GetFunctionList(void **list)
{
	const char *path = getenv("BADMODULE_WRAP");
	rv_t rv;

	rv = called(__func__);
	if (rv != OK)
		return rv;
	if (path && *path && wrapped == NULL) {
		void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL), *theirs;
		rv_t (*get)(void **) = library ? dlsym(library, "C_GetFunctionList") : NULL;

		if (get == NULL || get(&theirs) != OK)
			return DEVICE_ERROR;
		wrapped = (void **)((char *)theirs + sizeof(void *)); /* behind the version */
	}
	*list = &functions;
	return OK;
}
