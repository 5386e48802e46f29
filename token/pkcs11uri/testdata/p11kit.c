/*
 * Asks p11-kit what it makes of PKCS#11 URIs. Each line of the input is a word
 * and its arguments, texts in hexadecimal with a "." before them (so that empty
 * ones are there):
 *
 *   token LABEL MANUFACTURER SERIAL MODEL
 *   module MANUFACTURER DESCRIPTION MAJOR MINOR
 *   slot NUMBER MANUFACTURER DESCRIPTION
 *   object CLASS ID LABEL
 *   uri TEXT
 *
 * The first four add something to match with. Each "uri" is answered by a line:
 * "-" and p11-kit's error number, or "+", one 0 or 1 for each thing added
 * before, and the text that p11-kit writes for it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <p11-kit/pkcs11.h>
#include <p11-kit/uri.h>

enum kind { TOKEN, MODULE, SLOT, OBJECT };

struct thing {
	enum kind kind;
	CK_TOKEN_INFO token;
	CK_INFO module;
	CK_SLOT_ID slot_id;
	CK_SLOT_INFO slot;
	CK_OBJECT_CLASS class;
	unsigned char id[256], label[256];
	size_t id_len, label_len;
};

static struct thing things[64];
static int n_things;

static void die(const char *why)
{
	fprintf(stderr, "p11kit: %s\n", why);
	exit(1);
}

static char *word(void)
{
	char *w = strtok(NULL, " \n");
	if (w == NULL)
		die("a word is missing");
	return w;
}

static size_t text(unsigned char *to, size_t room)
{
	const char *hex = word();
	size_t n = 0;
	unsigned int byte;

	for (hex++; *hex; hex += 2) {
		if (n == room || sscanf(hex, "%2x", &byte) != 1)
			die("bad text");
		to[n++] = byte;
	}
	return n;
}

static void padded(unsigned char *to, size_t room)
{
	memset(to, ' ', room);
	text(to, room);
}

static int matches(P11KitUri *uri, struct thing *t)
{
	CK_ATTRIBUTE attrs[] = {
		{ CKA_CLASS, &t->class, sizeof t->class },
		{ CKA_ID, t->id, t->id_len },
		{ CKA_LABEL, t->label, t->label_len },
	};
	CK_SLOT_ID id = p11_kit_uri_get_slot_id(uri);

	switch (t->kind) {
	case TOKEN:
		return p11_kit_uri_match_token_info(uri, &t->token);
	case MODULE:
		return p11_kit_uri_match_module_info(uri, &t->module);
	case SLOT:
		return p11_kit_uri_match_slot_info(uri, &t->slot) && (id == (CK_SLOT_ID)-1 || id == t->slot_id);
	case OBJECT:
		return p11_kit_uri_match_attributes(uri, attrs, 3);
	}
	return 0;
}

static void answer(const char *s)
{
	P11KitUri *uri = p11_kit_uri_new();
	char *written = NULL;
	int i, err;

	err = p11_kit_uri_parse(s, P11_KIT_URI_FOR_ANY, uri);
	if (err != P11_KIT_URI_OK) {
		printf("- %d\n", err);
	} else {
		if (p11_kit_uri_format(uri, P11_KIT_URI_FOR_ANY, &written) != P11_KIT_URI_OK)
			die("cannot format");
		printf("+ ");
		for (i = 0; i < n_things; i++)
			putchar(matches(uri, &things[i]) ? '1' : '0');
		printf(" %s\n", written);
		free(written);
	}
	p11_kit_uri_free(uri);
}

int main(void)
{
	static char line[1 << 16];
	static unsigned char uri[1 << 15];

	while (fgets(line, sizeof line, stdin)) {
		struct thing *t = &things[n_things];
		char *what = strtok(line, " \n");

		if (what == NULL)
			die("an empty line");
		if (strcmp(what, "uri") == 0) {
			uri[text(uri, sizeof uri - 1)] = 0;
			answer((char *)uri);
			continue;
		}
		if (++n_things == sizeof things / sizeof things[0])
			die("too many things");
		if (strcmp(what, "token") == 0) {
			t->kind = TOKEN;
			padded(t->token.label, sizeof t->token.label);
			padded(t->token.manufacturerID, sizeof t->token.manufacturerID);
			padded(t->token.serialNumber, sizeof t->token.serialNumber);
			padded(t->token.model, sizeof t->token.model);
		} else if (strcmp(what, "module") == 0) {
			t->kind = MODULE;
			padded(t->module.manufacturerID, sizeof t->module.manufacturerID);
			padded(t->module.libraryDescription, sizeof t->module.libraryDescription);
			t->module.libraryVersion.major = atoi(word());
			t->module.libraryVersion.minor = atoi(word());
		} else if (strcmp(what, "slot") == 0) {
			t->kind = SLOT;
			t->slot_id = strtoul(word(), NULL, 10);
			padded(t->slot.manufacturerID, sizeof t->slot.manufacturerID);
			padded(t->slot.slotDescription, sizeof t->slot.slotDescription);
		} else if (strcmp(what, "object") == 0) {
			t->kind = OBJECT;
			t->class = strtoul(word(), NULL, 10);
			t->id_len = text(t->id, sizeof t->id);
			t->label_len = text(t->label, sizeof t->label);
		} else {
			die("an unknown word");
		}
	}
	return 0;
}
