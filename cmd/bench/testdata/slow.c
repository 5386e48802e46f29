/*
 * slow is a PKCS#11 module that hands every call on to another one, and makes
 * some of them slow, as cards and network HSMs are. The environment says how:
 *
 *   SLOW_MODULE   the path of the other module
 *   SLOW_SIGN     how many milliseconds a signature takes
 *   SLOW_WIDTH    how many are made at the same time; the others wait, and are served
 *                 in the order they came in, so that who has to wait for longer has
 *                 waited elsewhere
 *   SLOW_SEARCH   how many milliseconds each search for objects takes
 *   SLOW_HANG     a file: while it is there, C_Sign and C_GetSlotList do not return,
 *                 for ten minutes at the most, should nobody be left to remove it
 */
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long ulong;
typedef ulong (*function)(); /* called as PKCS#11 has them */

/* PKCS#11 v2.40, the order of CK_FUNCTION_LIST */
enum { GET_FUNCTION_LIST = 3, GET_SLOT_LIST = 4, FIND_OBJECTS_INIT = 26, SIGN = 43 };
struct function_list { unsigned char version[2]; function f[68]; };

static struct function_list list, *other;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t one_left = PTHREAD_COND_INITIALIZER;
static long came, gone;

static int number(const char *name)
{
	const char *value = getenv(name);

	return value ? atoi(value) : 0;
}

static void rest(int ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000L };

	while (nanosleep(&t, &t) != 0)
		; /* a signal came */
}

static void hang(void)
{
	const char *file = getenv("SLOW_HANG");

	for (int i = 0; file && access(file, F_OK) == 0 && i < 60000; i++)
		rest(10);
}

static ulong get_slot_list(unsigned char present, ulong *slots, ulong *count)
{
	hang();
	return other->f[GET_SLOT_LIST](present, slots, count);
}

static ulong find_objects_init(ulong session, void *template, ulong n)
{
	rest(number("SLOW_SEARCH"));
	return other->f[FIND_OBJECTS_INIT](session, template, n);
}

static ulong sign(ulong session, unsigned char *data, ulong length, unsigned char *signature, ulong *room)
{
	long number_in_line, width = number("SLOW_WIDTH");
	ulong rv;

	hang();
	if (signature == NULL) /* asks for the length */
		return other->f[SIGN](session, data, length, signature, room);
	pthread_mutex_lock(&lock);
	number_in_line = came++;
	while (width > 0 && number_in_line >= gone + width)
		pthread_cond_wait(&one_left, &lock);
	pthread_mutex_unlock(&lock);
	rest(number("SLOW_SIGN"));
	rv = other->f[SIGN](session, data, length, signature, room);
	pthread_mutex_lock(&lock);
	gone++;
	pthread_cond_broadcast(&one_left);
	pthread_mutex_unlock(&lock);
	return rv;
}

ulong C_GetFunctionList(struct function_list **out);

static void open_other(void)
{
	const char *path = getenv("SLOW_MODULE");
	void *module = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
	function get = module ? (function)dlsym(module, "C_GetFunctionList") : NULL;

	if (get == NULL || get(&other) != 0) {
		other = NULL;
		return;
	}
	list = *other;
	list.f[GET_FUNCTION_LIST] = (function)C_GetFunctionList;
	list.f[GET_SLOT_LIST] = (function)get_slot_list;
	list.f[FIND_OBJECTS_INIT] = (function)find_objects_init;
	list.f[SIGN] = (function)sign;
}

ulong C_GetFunctionList(struct function_list **out)
{
	pthread_once(&once, open_other);
	*out = &list;
	return other ? 0 : 5; /* CKR_GENERAL_ERROR */
}
