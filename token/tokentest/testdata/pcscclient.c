// A program that uses a smart card by PC/SC, as others do, and tells when it has
// what it wants. It keeps it until its standard input ends.
//
//	pcscclient exclusive     keeps the reader to itself
//	pcscclient transaction   shares it, and has a transaction
//
// It is linked with nothing: libpcsclite is opened, so that its headers need not
// be installed.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *library;

static void *function(const char *name)
{
	void *f = dlsym(library, name);

	if (f == NULL) {
		fprintf(stderr, "%s\n", dlerror());
		exit(2);
	}
	return f;
}

static void check(const char *what, long rv)
{
	if (rv != 0) {
		fprintf(stderr, "%s: 0x%08lx\n", what, rv & 0xffffffff);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	int exclusive = argc > 1 && strcmp(argv[1], "exclusive") == 0;
	unsigned long length, protocol;
	long context, card;
	char readers[4096];

	library = dlopen("libpcsclite.so.1", RTLD_NOW);
	if (library == NULL) {
		fprintf(stderr, "%s\n", dlerror());
		return 2;
	}
	length = sizeof readers;
	check("SCardEstablishContext", ((long (*)(unsigned long, void *, void *, long *))function("SCardEstablishContext"))(0, NULL, NULL, &context));
	check("SCardListReaders", ((long (*)(long, char *, char *, unsigned long *))function("SCardListReaders"))(context, NULL, readers, &length));
	check("SCardConnect", ((long (*)(long, char *, unsigned long, unsigned long, long *, unsigned long *))function("SCardConnect"))(context, readers,
		exclusive ? 1 : 2, 3, &card, &protocol));
	if (!exclusive)
		check("SCardBeginTransaction", ((long (*)(long))function("SCardBeginTransaction"))(card));
	puts("ready");
	fflush(stdout);
	while (getchar() != EOF)
		;
	if (!exclusive)
		check("SCardEndTransaction", ((long (*)(long, unsigned long))function("SCardEndTransaction"))(card, 0));
	check("SCardDisconnect", ((long (*)(long, unsigned long))function("SCardDisconnect"))(card, 0));
	check("SCardReleaseContext", ((long (*)(long))function("SCardReleaseContext"))(context));
	return 0;
}
