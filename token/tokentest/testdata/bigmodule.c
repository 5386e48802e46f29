/*
 * A PKCS#11 module that puts a crowd of key pairs in front of the objects of another one.
 *
 * BIGMODULE_WRAP is the path of the other module. Each of its tokens has BIGMODULE_PAIRS
 * more pairs of Ed25519 keys, which cannot sign. Private keys show after a login. A pair
 * has an ID of 4 bytes, and a label of 32 bytes: all byte values come, in turn.
 *
 * While the file BIGMODULE_HOLD exists, C_GetAttributeValue does not return, and makes the
 * file BIGMODULE_HOLD.held.
 *
 * BIGMODULE_COUNT is a file that has the numbers of calls so far, each of 8 bytes: of
 * C_FindObjects, and of C_GetAttributeValue.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef unsigned char byte;
typedef unsigned long ulong;
typedef ulong rv_t;

enum { OK = 0, DEVICE_ERROR = 0x30, ATTRIBUTE_TYPE_INVALID = 0x12, KEY_TYPE_INCONSISTENT = 0x63, BUFFER_TOO_SMALL = 0x150 };

struct attribute { ulong type; void *value; ulong length; };
struct session_info { ulong slot, state, flags, error; };

#define CROWD (1UL << 40)	/* handles of the crowd */
#define PRIVATE (1UL << 32)	/* is added for private keys */

static void **wrapped;
static ulong pairs;

/* A search that is under way. */
static struct search {
	ulong session, next, class, type;
	byte id[4], label[32];
	int by_id, by_label, none;
} searches[4096];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void count(int which)
{
	static volatile ulong *counts;
	const char *path = getenv("BIGMODULE_COUNT");

	if (path == NULL || *path == 0)
		return;
	pthread_mutex_lock(&lock);
	if (counts == NULL) {
		int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		void *p;

		if (fd < 0 || ftruncate(fd, 2 * sizeof(ulong)) != 0)
			abort();
		p = mmap(NULL, 2 * sizeof(ulong), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (p == MAP_FAILED)
			abort();
		counts = p;
	}
	counts[which]++;
	pthread_mutex_unlock(&lock);
}

static void hold(void)
{
	const char *path = getenv("BIGMODULE_HOLD");
	char held[4096];

	if (path == NULL || *path == 0 || access(path, F_OK) != 0)
		return;
	snprintf(held, sizeof held, "%s.held", path);
	close(open(held, O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
	while (access(path, F_OK) == 0)
		usleep(1000);
}

static void id_of(ulong i, byte id[4])
{
	ulong n = i + 0x10000000;

	id[0] = n >> 24, id[1] = n >> 16, id[2] = n >> 8, id[3] = n;
}

static void label_of(ulong i, byte label[32])
{
	ulong j;

	for (j = 0; j < 32; j++)
		label[j] = 32 * i + j;
}

static int logged_in(ulong session)
{
	struct session_info info;

	if (((rv_t (*)(ulong, struct session_info *))wrapped[15])(session, &info) != OK)
		return 0;
	return info.state == 1 || info.state == 3;
}

static rv_t find_init(ulong session, struct attribute *list, ulong n)
{
	struct search *s = &searches[session % 4096];
	ulong i;
	rv_t rv = ((rv_t (*)(ulong, struct attribute *, ulong))wrapped[26])(session, list, n);

	if (rv != OK)
		return rv;
	memset(s, 0, sizeof *s);
	s->session = session;
	s->class = s->type = ~0UL;
	for (i = 0; i < n; i++) {
		switch (list[i].type) {
		case 0x0: s->class = *(ulong *)list[i].value; break;
		case 0x100: s->type = *(ulong *)list[i].value; break;
		case 0x102:
			s->by_id = 1;
			if (list[i].length == 4)
				memcpy(s->id, list[i].value, 4);
			else
				s->none = 1;
			break;
		case 0x3:
			s->by_label = 1;
			if (list[i].length == 32)
				memcpy(s->label, list[i].value, 32);
			else
				s->none = 1;
			break;
		}
	}
	if (s->type != ~0UL && s->type != 0x40)
		s->none = 1;
	if (s->class != 2 && !(s->class == 3 && logged_in(session)))
		s->none = 1;
	return OK;
}

static rv_t find(ulong session, ulong *list, ulong room, ulong *found)
{
	struct search *s = &searches[session % 4096];
	ulong n = 0;

	count(0);
	for (; !s->none && s->next < pairs && n < room; s->next++) {
		byte id[4], label[32];

		id_of(s->next, id);
		label_of(s->next, label);
		if ((s->by_id && memcmp(id, s->id, 4) != 0) || (s->by_label && memcmp(label, s->label, 32) != 0))
			continue;
		list[n++] = CROWD + (s->class == 3 ? PRIVATE : 0) + s->next;
	}
	if (n == 0)
		return ((rv_t (*)(ulong, ulong *, ulong, ulong *))wrapped[27])(session, list, room, found);
	*found = n;
	return OK;
}

static rv_t attributes(ulong session, ulong object, struct attribute *list, ulong n)
{
	static const byte ed25519[] = { 0x06, 0x03, 0x2b, 0x65, 0x70 };
	int private = object >= CROWD + PRIVATE;
	ulong i, number = object - CROWD - (private ? PRIVATE : 0);
	ulong class = private ? 3 : 2, type = 0x40;
	byte yes = 1, id[4], label[32], point[34];
	rv_t rv = OK;

	count(1);
	if (object < CROWD)
		return ((rv_t (*)(ulong, ulong, struct attribute *, ulong))wrapped[24])(session, object, list, n);
	hold();
	id_of(number, id);
	label_of(number, label);
	memset(point, 0x5b, sizeof point);
	point[0] = 0x04, point[1] = 32;
	memcpy(point + 2, id, 4);
	for (i = 0; i < n; i++) {
		const void *value = NULL;
		ulong length = 0;

		switch (list[i].type) {
		case 0x0: value = &class; length = sizeof class; break;
		case 0x3: value = label; length = sizeof label; break;
		case 0x100: value = &type; length = sizeof type; break;
		case 0x102: value = id; length = sizeof id; break;
		case 0x108: if (private) { value = &yes; length = 1; } break;
		case 0x10a: if (!private) { value = &yes; length = 1; } break;
		case 0x180: value = ed25519; length = sizeof ed25519; break;
		case 0x181: if (!private) { value = point; length = sizeof point; } break;
		}
		if (value == NULL) {
			rv = ATTRIBUTE_TYPE_INVALID;
			list[i].length = ~0UL;
		} else if (list[i].value != NULL && list[i].length < length) {
			rv = BUFFER_TOO_SMALL;
			list[i].length = ~0UL;
		} else {
			if (list[i].value != NULL)
				memcpy(list[i].value, value, length);
			list[i].length = length;
		}
	}
	return rv;
}

static rv_t sign_init(ulong session, void *mechanism, ulong key)
{
	if (key >= CROWD)
		return KEY_TYPE_INCONSISTENT;
	return ((rv_t (*)(ulong, void *, ulong))wrapped[42])(session, mechanism, key);
}

static struct {
	byte version[sizeof(void *)]; /* and what is behind it */
	void *functions[68];
} functions;

rv_t C_GetFunctionList(void **list)
{
	const char *path = getenv("BIGMODULE_WRAP"), *many = getenv("BIGMODULE_PAIRS");

	if (wrapped == NULL) {
		void *library = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL, *theirs;
		rv_t (*get)(void **) = library ? dlsym(library, "C_GetFunctionList") : NULL;

		if (get == NULL || get(&theirs) != OK)
			return DEVICE_ERROR;
		pairs = many ? strtoul(many, NULL, 0) : 0;
		memcpy(&functions, theirs, sizeof functions);
		wrapped = (void **)((char *)theirs + sizeof(void *));
		functions.functions[24] = attributes;
		functions.functions[26] = find_init;
		functions.functions[27] = find;
		functions.functions[42] = sign_init;
	}
	*list = &functions;
	return OK;
}
