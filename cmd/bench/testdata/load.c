/*
 * load makes signatures for a while, from any number of threads, and tells in
 * one line of JSON how many there were and how long each took:
 *
 *   load token MODULE LABEL PIN ID MECHANISM DATA THREADS SECONDS COUNT
 *       in a loop of C_SignInit and C_Sign on a key of a PKCS#11 module
 *   load agent SOCKET keep|each MESSAGE THREADS SECONDS COUNT
 *       with requests to an ssh-agent, on connections that are kept, or with one
 *       for each request
 *   load relay MODULE LABEL PIN ID MECHANISM DATA SOCKET
 *       answers on the socket until it is stopped, whatever is asked, with a signature
 *       that a second process makes: what an agent does, and nothing else
 *   load make MODULE LABEL PIN KIND FIRST COUNT
 *       makes the keys to do that with, with the IDs FIRST, FIRST + 1 and so on
 *
 * The first two end after SECONDS or COUNT, whichever comes first; 0 means without
 * that bound. ID, DATA and MESSAGE are in hexadecimal, MECHANISM is its number. Every
 * thread has a session, or a connection, of its own, and nothing is shared
 * between them, so that what is measured is what answers.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long ulong;
typedef ulong (*function)(); /* C_GetFunctionList and its like, called as PKCS#11 has them */

/* PKCS#11 v2.40, the order of CK_FUNCTION_LIST */
enum {
	INITIALIZE = 0, GET_SLOT_LIST = 4, GET_TOKEN_INFO = 6, OPEN_SESSION = 12, LOGIN = 18,
	FIND_OBJECTS_INIT = 26, FIND_OBJECTS = 27, FIND_OBJECTS_FINAL = 28, SIGN_INIT = 42, SIGN = 43,
	GENERATE_KEY_PAIR = 59,
};
enum {
	CKA_TOKEN = 1, CKA_PRIVATE = 2, CKA_LABEL = 3, CKA_ID = 0x102, CKA_SENSITIVE = 0x103, CKA_SIGN = 0x108,
	CKA_VERIFY = 0x10a, CKA_MODULUS_BITS = 0x121, CKA_PUBLIC_EXPONENT = 0x122, CKA_EXTRACTABLE = 0x162,
	CKA_EC_PARAMS = 0x180,
};
struct function_list { unsigned char version[2]; function f[68]; };
struct attribute { ulong type; void *value; ulong length; };
struct mechanism { ulong type; void *parameter; ulong length; };
struct init_args { void *mutex[4]; ulong flags; void *reserved; };

static struct function_list *list;
static ulong slot, key, mechanism;
static unsigned char *data;
static size_t data_length;
static const char *socket_path;
static int each;
static double seconds;
static long limit;
static atomic_long begun;
static struct timespec start;
static double cpu_before; /* what opening the token has taken */

struct worker {
	pthread_t thread;
	ulong session;
	long count;
	uint32_t *took; /* in units of 100 ns */
	size_t room;
};

static _Noreturn void die(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fputs("load: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	exit(1);
}

static void check(const char *what, ulong rv)
{
	if (rv != 0)
		die("%s: %#lx", what, rv);
}

static unsigned char *unhex(const char *text, size_t *length)
{
	size_t i, n = strlen(text) / 2;
	unsigned char *b = malloc(n + 1);

	for (i = 0; i < n; i++) {
		unsigned value;

		if (sscanf(text + 2 * i, "%2x", &value) != 1)
			die("not hexadecimal: %s", text);
		b[i] = value;
	}
	*length = n;
	return b;
}

static int64_t since(const struct timespec *from, const struct timespec *to)
{
	return (to->tv_sec - from->tv_sec) * 1000000000LL + (to->tv_nsec - from->tv_nsec);
}

/* next tells whether there is to be another one, and notes how long the last took. Each
 * worker does at least one, however late the machine lets it start. */
static int next(struct worker *w, struct timespec *last)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	if (last->tv_sec != 0) {
		if ((size_t)w->count == w->room) {
			w->room = w->room ? 2 * w->room : 4096;
			w->took = realloc(w->took, w->room * sizeof *w->took);
		}
		w->took[w->count++] = since(last, &now) / 100;
	}
	*last = now;
	if (seconds > 0 && w->count > 0 && since(&start, &now) >= seconds * 1e9)
		return 0;
	return limit == 0 || atomic_fetch_add(&begun, 1) < limit;
}

static void *sign_loop(void *arg)
{
	struct worker *w = arg;
	struct mechanism m = { mechanism, NULL, 0 };
	struct timespec last = { 0 };
	unsigned char signature[1024];

	while (next(w, &last)) {
		ulong n = sizeof signature;

		check("C_SignInit", list->f[SIGN_INIT](w->session, &m, key));
		check("C_Sign", list->f[SIGN](w->session, data, (ulong)data_length, signature, &n));
	}
	return NULL;
}

/* agent_socket makes a socket that is connected to socket_path, or listens there. */
static int agent_socket(int (*use)(int, const struct sockaddr *, socklen_t))
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	strncpy(name.sun_path, socket_path, sizeof name.sun_path - 1);
	if (fd < 0 || use(fd, (struct sockaddr *)&name, sizeof name) != 0)
		die("%s: %s", socket_path, strerror(errno));
	return fd;
}

/* receive reads a message, and returns how long it is, its length included, or 0 at
 * the end. */
static size_t receive(int fd, unsigned char *message, size_t room)
{
	size_t have = 0, want = 4;

	while (have < want) {
		ssize_t n = read(fd, message + have, room - have);

		if (n <= 0)
			return 0;
		have += n;
		if (have >= 4)
			want = 4 + ((size_t)message[0] << 24 | message[1] << 16 | message[2] << 8 | message[3]);
		if (want > room)
			die("message of %zu bytes", want);
	}
	return have;
}

static void *agent_loop(void *arg)
{
	struct worker *w = arg;
	struct timespec last = { 0 };
	size_t room = 512 << 10;
	unsigned char *answer = malloc(room);
	int fd = each ? -1 : agent_socket(connect);

	while (next(w, &last)) {
		if (each)
			fd = agent_socket(connect);
		if (write(fd, data, data_length) != (ssize_t)data_length)
			die("write: %s", strerror(errno));
		if (receive(fd, answer, room) == 0)
			die("read: %s", errno ? strerror(errno) : "the agent hung up");
		/* SSH_AGENT_IDENTITIES_ANSWER answers 11, SSH_AGENT_SIGN_RESPONSE 13 */
		if (answer[4] != data[4] + 1)
			die("the agent answers %d to %d", answer[4], data[4]);
		if (each)
			close(fd);
	}
	return NULL;
}

static double cpu(void)
{
	struct rusage used;

	getrusage(RUSAGE_SELF, &used);
	return used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static int compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

/* report prints what the workers have done. Times are in microseconds. */
static void report(struct worker *all, int n)
{
	struct timespec end;
	long total = 0, at = 0;
	double sum = 0, squares = 0;
	uint32_t *took;
	int i;

	clock_gettime(CLOCK_MONOTONIC, &end);
	for (i = 0; i < n; i++) {
		total += all[i].count;
		sum += all[i].count;
		squares += (double)all[i].count * all[i].count;
	}
	took = malloc((total + 1) * sizeof *took);
	for (i = 0; i < n; i++) {
		memcpy(took + at, all[i].took, all[i].count * sizeof *took);
		at += all[i].count;
	}
	if (total == 0)
		die("nothing was answered");
	qsort(took, total, sizeof *took, compare);
	printf("{\"count\": %ld, \"seconds\": %.6f, \"cpu\": %.6f, \"median\": %.1f, \"p99\": %.1f, \"longest\": %.1f, \"jain\": %.4f}\n",
		total, since(&start, &end) / 1e9, cpu() - cpu_before,
		took[total / 2] / 10.0, took[total * 99 / 100] / 10.0, took[total - 1] / 10.0,
		squares > 0 ? sum * sum / (n * squares) : 0);
}

/* open_token opens a session on a token, and logs in. */
static ulong open_token(char **arg)
{
	struct init_args init = { .flags = 2 /* CKF_OS_LOCKING_OK */ };
	ulong slots[64], count = 64, i, session;
	unsigned char info[512];
	void *module = dlopen(arg[0], RTLD_NOW | RTLD_LOCAL);
	function get = module ? (function)dlsym(module, "C_GetFunctionList") : NULL;

	if (get == NULL)
		die("%s", dlerror());
	check("C_GetFunctionList", get(&list));
	check("C_Initialize", list->f[INITIALIZE](&init));
	check("C_GetSlotList", list->f[GET_SLOT_LIST](1, slots, &count));
	for (i = 0; i < count; i++) {
		check("C_GetTokenInfo", list->f[GET_TOKEN_INFO](slots[i], info));
		if (memcmp(info, arg[1], strlen(arg[1])) == 0 && info[strlen(arg[1])] == ' ')
			break;
	}
	if (i == count)
		die("no token %s", arg[1]);
	slot = slots[i];
	check("C_OpenSession", list->f[OPEN_SESSION](slot, 6ul /* read, write */, NULL, NULL, &session));
	check("C_Login", list->f[LOGIN](session, 1ul, arg[2], (ulong)strlen(arg[2])));
	return session;
}

static void find_key(ulong session, const char *name)
{
	ulong class = 3 /* CKO_PRIVATE_KEY */, count;
	size_t length;
	unsigned char *id = unhex(name, &length);
	struct attribute template[] = { { 0, &class, sizeof class }, { CKA_ID, id, length } };

	check("C_FindObjectsInit", list->f[FIND_OBJECTS_INIT](session, template, 2ul));
	check("C_FindObjects", list->f[FIND_OBJECTS](session, &key, 1ul, &count));
	check("C_FindObjectsFinal", list->f[FIND_OBJECTS_FINAL](session));
	if (count != 1)
		die("no key %s", name);
}

/* The relay has a lane for each client, at most so many: a socket pair with a thread at
 * either end. */
enum { LANES = 64, REQUEST = 4096, AWAKE = 100000 /* ns */ };
static struct lane { int ours, theirs; atomic_int taken; } lanes[LANES];
static atomic_int awake;

/* await receives a request. One thread at a time does not sleep at once when there is
 * none: to be woken takes as long as a fast signature. */
static ssize_t await(int fd, unsigned char *request)
{
	struct timespec from, now;
	ssize_t n = -1;

	if (atomic_exchange(&awake, 1))
		return recv(fd, request, REQUEST, 0);
	clock_gettime(CLOCK_MONOTONIC, &from);
	for (now = from; n < 0 && since(&from, &now) < AWAKE; clock_gettime(CLOCK_MONOTONIC, &now)) {
		n = recv(fd, request, REQUEST, MSG_DONTWAIT);
		if (n < 0)
			sched_yield();
	}
	atomic_store(&awake, 0);
	return n < 0 ? recv(fd, request, REQUEST, 0) : n;
}

/* relay_sign signs for one lane. */
static void *relay_sign(void *arg)
{
	struct lane *l = arg;
	struct mechanism m = { mechanism, NULL, 0 };
	unsigned char request[REQUEST], signature[1024];
	ulong session;

	check("C_OpenSession", list->f[OPEN_SESSION](slot, 4ul, NULL, NULL, &session));
	while (await(l->theirs, request) > 0) {
		ulong n = sizeof signature;

		check("C_SignInit", list->f[SIGN_INIT](session, &m, key));
		check("C_Sign", list->f[SIGN](session, data, (ulong)data_length, signature, &n));
		if (send(l->theirs, signature, n, 0) < 0)
			break;
	}
	return NULL;
}

struct client { int fd; struct lane *lane; };

/* relay_client serves one client. */
static void *relay_client(void *arg)
{
	struct client *c = arg;
	unsigned char request[REQUEST], answer[1024 + 9];
	size_t length;

	while ((length = receive(c->fd, request, sizeof request)) > 0) {
		ssize_t n;

		send(c->lane->ours, request, length, 0);
		n = recv(c->lane->ours, answer + 9, sizeof answer - 9, 0);
		if (n <= 0)
			die("the process that signs has gone");
		/* SSH_AGENT_SIGN_RESPONSE, as far as its reader looks */
		memcpy(answer, (unsigned char[]){ 0, 0, (n + 5) >> 8, n + 5, 14, 0, 0, n >> 8, n }, 9);
		if (write(c->fd, answer, n + 9) < 0)
			break;
	}
	close(c->fd);
	atomic_store(&c->lane->taken, 0);
	free(c);
	return NULL;
}

static void start_thread(void *(*run)(void *), void *arg)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, run, arg) != 0 || pthread_detach(thread) != 0)
		die("no more threads");
}

static _Noreturn void relay(char **token, const char *id)
{
	int i, fd, listener;

	signal(SIGPIPE, SIG_IGN);
	for (i = 0; i < LANES; i++) {
		int pair[2];

		if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) != 0)
			die("socketpair: %s", strerror(errno));
		lanes[i].ours = pair[0];
		lanes[i].theirs = pair[1];
	}
	if (fork() == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		find_key(open_token(token), id);
		for (i = 0; i < LANES; i++)
			start_thread(relay_sign, &lanes[i]);
		send(lanes[0].theirs, "", 1, 0);
		for (;;)
			pause();
	}
	/* SoftHSM shows no token to others while somebody logs in to it. */
	if (recv(lanes[0].ours, &i, sizeof i, 0) != 1)
		die("the process that signs has gone");
	listener = agent_socket(bind);
	if (listen(listener, LANES) != 0)
		die("listen: %s", strerror(errno));
	while ((fd = accept(listener, NULL, NULL)) >= 0) {
		struct client *c = malloc(sizeof *c);

		for (i = 0; i < LANES && atomic_exchange(&lanes[i].taken, 1); i++)
			;
		if (i == LANES)
			die("too many clients");
		*c = (struct client){ fd, &lanes[i] };
		start_thread(relay_client, c);
	}
	die("accept: %s", strerror(errno));
}

/* make_keys makes key pairs. Only one of curve and bits counts. */
static void make_keys(ulong session, const char *kind, long first, long count)
{
	static const struct { const char *name, *curve; ulong length, bits, mechanism; } kinds[] = {
		{ "p256", "\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07", 10, 0, 0x1040 },
		{ "p384", "\x06\x05\x2b\x81\x04\x00\x22", 7, 0, 0x1040 },
		{ "ed25519", "\x13\x0c" "edwards25519", 14, 0, 0x1055 },
		{ "rsa2048", NULL, 0, 2048, 0 },
		{ "rsa4096", NULL, 0, 4096, 0 },
	};
	size_t k = 0, n = sizeof kinds / sizeof kinds[0];
	unsigned char yes = 1, no = 0, id[2], exponent[] = { 1, 0, 1 };
	char label[32];
	long i;

	while (k < n && strcmp(kinds[k].name, kind) != 0)
		k++;
	if (k == n)
		die("%s is no kind of key", kind);
	for (i = first; i < first + count; i++) {
		struct mechanism m = { kinds[k].mechanism, NULL, 0 };
		ulong bits = kinds[k].bits, pub, priv, length = snprintf(label, sizeof label, "key %ld", i);
		struct attribute public[] = {
			{ CKA_TOKEN, &yes, 1 }, { CKA_PRIVATE, &no, 1 }, { CKA_VERIFY, &yes, 1 }, { CKA_ID, id, 2 }, { CKA_LABEL, label, length },
			{ CKA_EC_PARAMS, (void *)kinds[k].curve, kinds[k].length }, { CKA_PUBLIC_EXPONENT, exponent, 3 },
		};
		struct attribute private[] = {
			{ CKA_TOKEN, &yes, 1 }, { CKA_PRIVATE, &yes, 1 }, { CKA_SENSITIVE, &yes, 1 }, { CKA_EXTRACTABLE, &no, 1 },
			{ CKA_SIGN, &yes, 1 }, { CKA_ID, id, 2 }, { CKA_LABEL, label, length },
		};

		id[0] = i >> 8;
		id[1] = i;
		if (bits != 0)
			public[5] = (struct attribute){ CKA_MODULUS_BITS, &bits, sizeof bits };
		check("C_GenerateKeyPair", list->f[GENERATE_KEY_PAIR](session, &m, public, bits ? 7ul : 6ul, private, 7ul, &pub, &priv));
	}
}

int main(int argc, char **argv)
{
	struct worker *all;
	char **rest;
	void *(*loop)(void *);
	int i, n;

	if (argc == 8 && strcmp(argv[1], "make") == 0) {
		make_keys(open_token(argv + 2), argv[5], atol(argv[6]), atol(argv[7]));
		return 0;
	}
	if (argc == 9 && strcmp(argv[1], "relay") == 0) {
		mechanism = strtoul(argv[6], NULL, 0);
		data = unhex(argv[7], &data_length);
		socket_path = argv[8];
		relay(argv + 2, argv[5]);
	}
	if (argc == 11 && strcmp(argv[1], "token") == 0) {
		find_key(open_token(argv + 2), argv[5]);
		mechanism = strtoul(argv[6], NULL, 0);
		data = unhex(argv[7], &data_length);
		loop = sign_loop;
		rest = argv + 8;
	} else if (argc == 8 && strcmp(argv[1], "agent") == 0) {
		socket_path = argv[2];
		each = strcmp(argv[3], "each") == 0;
		data = unhex(argv[4], &data_length);
		loop = agent_loop;
		rest = argv + 5;
	} else {
		die("see the top of load.c");
	}
	n = atoi(rest[0]);
	seconds = atof(rest[1]);
	limit = atol(rest[2]);
	all = calloc(n, sizeof *all);
	for (i = 0; loop == sign_loop && i < n; i++)
		check("C_OpenSession", list->f[OPEN_SESSION](slot, 4ul, NULL, NULL, &all[i].session));
	cpu_before = cpu();
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (i = 0; i < n; i++)
		if (pthread_create(&all[i].thread, NULL, loop, &all[i]) != 0)
			die("no more threads");
	for (i = 0; i < n; i++)
		pthread_join(all[i].thread, NULL);
	report(all, n);
	return 0;
}
