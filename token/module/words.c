// What a module writes to the system log, for the agent to tell a person.
//
// SoftHSM and others say there alone why they fail. The dynamic linker looks for the
// functions of syslog(3) in the program before it looks in the C library: ld(1) lists
// what both define among the program's dynamic symbols. So the functions of this file
// stand in for those. They print each warning and error to standard error, which the
// agent reads, and then call the C library's.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "words.h"

enum { severity = 7, warning = 4 }; // of the priority: LOG_PRIMASK and LOG_WARNING of <syslog.h>

static int quoting;

void quote_syslog(void)
{
	quoting = 1;
}

static void quote(int priority, const char *format, va_list args)
{
	char line[512];
	va_list copy;
	int n;

	if (!quoting || (priority & severity) > warning)
		return;
	va_copy(copy, args);
	n = vsnprintf(line, sizeof line - 1, format, copy);
	va_end(copy);
	if (n < 0)
		return;
	if (n > (int)sizeof line - 2)
		n = sizeof line - 2;
	line[n] = '\n';
	if (write(STDERR_FILENO, line, n + 1) < 0)
		return; // nobody reads it
}

typedef void vsyslog_function(int, const char *, va_list);

static void both(int priority, const char *format, va_list args)
{
	static vsyslog_function *real;

	quote(priority, format, args);
	if (real == NULL)
		*(void **)&real = dlsym(RTLD_NEXT, "vsyslog");
	if (real != NULL)
		real(priority, format, args);
}

// The names ending in _chk are those that programs call which were compiled with
// _FORTIFY_SOURCE.

void vsyslog(int priority, const char *format, va_list args)
{
	both(priority, format, args);
}

void __vsyslog_chk(int priority, int flag, const char *format, va_list args)
{
	(void)flag;
	both(priority, format, args);
}

void syslog(int priority, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	both(priority, format, args);
	va_end(args);
}

void __syslog_chk(int priority, int flag, const char *format, ...)
{
	va_list args;

	(void)flag;
	va_start(args, format);
	both(priority, format, args);
	va_end(args);
}
