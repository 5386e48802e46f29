package module

/*
#cgo linux LDFLAGS: -ldl

#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>

#include "cryptoki.h"
#include "words.h"

// open_library loads a module. It returns NULL and what dlerror says, or NULL and
// nothing when the file is no module.
static void *open_library(const char *path, const char **error)
{
	void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);

	*error = NULL;
	if (handle == NULL)
		*error = dlerror();
	else if (dlsym(handle, "C_GetFunctionList") == NULL)
		handle = NULL;
	return handle;
}

// function_list finds the functions that the pkcs11 package has got from the
// library: its struct ctx holds the library and the list, which is NULL when
// C_GetFunctionList has failed. It returns 0 when that is not what is there.
static int function_list(void *ctx, void *library, struct functions **list)
{
	struct { void *library; struct functions *list; } *c = ctx;

	if (c->library != library)
		return 0;
	*list = c->list;
	return 1;
}

// crash_quietly takes the signals of a crash away from the Go runtime, which
// prints registers and stacks whatever debug.SetTraceback says.
static int crash_quietly(void)
{
	static const int signals[] = { SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGSYS };
	size_t i;

	for (i = 0; i < sizeof signals / sizeof signals[0]; i++)
		if (signal(signals[i], SIG_DFL) == SIG_ERR)
			return 0;
	return 1;
}

static CK_RV get_slot_list(struct functions *f, CK_BYTE present, CK_ULONG *list, CK_ULONG *count)
{
	return f->get_slot_list ? f->get_slot_list(present, list, count) : CKR_FUNCTION_NOT_SUPPORTED;
}

static CK_RV get_mechanism_list(struct functions *f, CK_ULONG slot, CK_ULONG *list, CK_ULONG *count)
{
	return f->get_mechanism_list ? f->get_mechanism_list(slot, list, count) : CKR_FUNCTION_NOT_SUPPORTED;
}

static CK_RV find_objects(struct functions *f, CK_ULONG session, CK_ULONG *list, CK_ULONG room, CK_ULONG *count)
{
	return f->find_objects ? f->find_objects(session, list, room, count) : CKR_FUNCTION_NOT_SUPPORTED;
}

static CK_RV login(struct functions *f, CK_ULONG session, CK_ULONG user, CK_BYTE *pin, CK_ULONG length)
{
	return f->login ? f->login(session, user, pin, length) : CKR_FUNCTION_NOT_SUPPORTED;
}

static CK_RV init_token(struct functions *f, CK_ULONG slot, CK_BYTE *pin, CK_ULONG length, CK_BYTE *label)
{
	return f->init_token ? f->init_token(slot, pin, length, label) : CKR_FUNCTION_NOT_SUPPORTED;
}

static CK_RV init_pin(struct functions *f, CK_ULONG session, CK_BYTE *pin, CK_ULONG length)
{
	return f->init_pin ? f->init_pin(session, pin, length) : CKR_FUNCTION_NOT_SUPPORTED;
}

// get_attributes reads n attributes. lengths holds the room for each of them in
// arena, one after the other, and what C_GetAttributeValue made of it afterwards.
static CK_RV get_attributes(struct functions *f, CK_ULONG session, CK_ULONG object, CK_ULONG n,
	const CK_ULONG *types, CK_ULONG *lengths, CK_BYTE *arena)
{
	struct attribute list[16];
	CK_ULONG i;
	CK_RV rv;

	if (f->get_attribute_value == NULL)
		return CKR_FUNCTION_NOT_SUPPORTED;
	if (n > sizeof list / sizeof list[0])
		return CKR_GENERAL_ERROR;
	for (i = 0; i < n; i++) {
		list[i].type = types[i];
		list[i].value = arena;
		list[i].length = lengths[i];
		arena += lengths[i];
	}
	rv = f->get_attribute_value(session, object, list, n);
	for (i = 0; i < n; i++)
		lengths[i] = list[i].length;
	return rv;
}

// attribute_length asks how many bytes C_GetAttributeValue wants for an attribute.
static CK_RV attribute_length(struct functions *f, CK_ULONG session, CK_ULONG object, CK_ULONG type, CK_ULONG *length)
{
	struct attribute one = { type, NULL, 0 };
	CK_RV rv;

	if (f->get_attribute_value == NULL)
		return CKR_FUNCTION_NOT_SUPPORTED;
	rv = f->get_attribute_value(session, object, &one, 1);
	*length = one.length;
	return rv;
}

static CK_RV sign_init(struct functions *f, CK_ULONG session, CK_ULONG type, CK_ULONG key,
	CK_ULONG hash, CK_ULONG mgf, CK_ULONG salt)
{
	struct pss_params pss = { hash, mgf, salt };
	struct mechanism mechanism = { type, NULL, 0 };

	if (f->sign_init == NULL)
		return CKR_FUNCTION_NOT_SUPPORTED;
	if (hash != 0) {
		mechanism.parameter = &pss;
		mechanism.length = sizeof pss;
	}
	return f->sign_init(session, &mechanism, key);
}

static CK_RV decrypt_init(struct functions *f, CK_ULONG session, CK_ULONG type, CK_ULONG key,
	CK_ULONG hash, CK_ULONG mgf, CK_BYTE *source, CK_ULONG source_length)
{
	struct oaep_params oaep = { hash, mgf, CKZ_DATA_SPECIFIED, source, source_length };
	struct mechanism mechanism = { type, NULL, 0 };

	if (f->decrypt_init == NULL)
		return CKR_FUNCTION_NOT_SUPPORTED;
	if (hash != 0) {
		mechanism.parameter = &oaep;
		mechanism.length = sizeof oaep;
	}
	return f->decrypt_init(session, &mechanism, key);
}

struct output {
	CK_RV rv;
	CK_ULONG length;
};

// sign returns the length as a value: a variable of Go for it would be garbage after
// each signature.
static struct output sign(struct functions *f, CK_ULONG session, CK_BYTE *data, CK_ULONG length,
	CK_BYTE *signature, CK_ULONG room)
{
	struct output o = { CKR_FUNCTION_NOT_SUPPORTED, room };

	if (f->sign != NULL)
		o.rv = f->sign(session, data, length, signature, &o.length);
	return o;
}

static struct output decrypt(struct functions *f, CK_ULONG session, CK_BYTE *data, CK_ULONG length,
	CK_BYTE *plaintext, CK_ULONG room)
{
	struct output o = { CKR_FUNCTION_NOT_SUPPORTED, room };

	if (f->decrypt != NULL)
		o.rv = f->decrypt(session, data, length, plaintext, &o.length);
	return o;
}

struct derived {
	CK_RV derive, read, destroy; // what C_DeriveKey, C_GetAttributeValue and C_DestroyObject return
	CK_ULONG length;
};

// derive makes a key object in the session, reads its value and destroys it.
static struct derived derive(struct functions *f, CK_ULONG session, CK_ULONG type, CK_ULONG key,
	CK_BYTE *peer, CK_ULONG peer_length, CK_BYTE *value, CK_ULONG length)
{
	CK_ULONG class = CKO_SECRET_KEY, key_type = CKK_GENERIC_SECRET, object = 0;
	CK_BYTE yes = 1, no = 0;
	struct ecdh1_params ecdh1 = { CKD_NULL, 0, NULL, peer_length, peer };
	struct mechanism mechanism = { type, &ecdh1, sizeof ecdh1 };
	struct attribute template[] = {
		{ CKA_CLASS, &class, sizeof class },
		{ CKA_KEY_TYPE, &key_type, sizeof key_type },
		{ CKA_TOKEN, &no, sizeof no },
		{ CKA_PRIVATE, &no, sizeof no },
		{ CKA_SENSITIVE, &no, sizeof no },
		{ CKA_EXTRACTABLE, &yes, sizeof yes },
		{ CKA_VALUE_LEN, &length, sizeof length },
	};
	struct attribute result = { CKA_VALUE, value, length };
	struct derived d = { CKR_FUNCTION_NOT_SUPPORTED, 0, 0, 0 };

	if (f->derive_key == NULL || f->get_attribute_value == NULL || f->destroy_object == NULL)
		return d;
	d.derive = f->derive_key(session, &mechanism, key, template, sizeof template / sizeof template[0], &object);
	if (d.derive != 0)
		return d;
	d.read = f->get_attribute_value(session, object, &result, 1);
	d.length = result.length;
	d.destroy = f->destroy_object(session, object);
	return d;
}

// wait_for_slot_event is not in the list of a module of v2.0, which ends before.
static CK_RV wait_for_slot_event(struct functions *f, CK_ULONG flags, CK_ULONG *slot)
{
	if (f->major == 2 && f->minor == 0)
		return CKR_FUNCTION_NOT_SUPPORTED;
	return f->wait_for_slot_event ? f->wait_for_slot_event(flags, slot, NULL) : CKR_FUNCTION_NOT_SUPPORTED;
}
*/
import "C"

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/miekg/pkcs11"

	"p11-agent/token/wire"
)

// A library is the module, loaded into this process. Its methods are the calls of
// PKCS#11. Any number of goroutines may use them, and they return *wire.Error.
//
// Most methods use github.com/miekg/pkcs11. Some call the module here, through the same
// function list, because of what that package does:
//
//   - C_Login: it leaves a copy of the PIN in the heap.
//   - C_Sign and C_Decrypt: it calls the functions twice, to ask for the length first.
//   - C_Decrypt and C_DeriveKey: it leaves copies of the result in the heap.
//   - C_GetAttributeValue: it returns nothing at all when one attribute is missing.
//   - C_WaitForSlotEvent: it does not return the result.
//   - C_GetSlotList, C_GetMechanismList, C_FindObjects and C_GetAttributeValue: it trusts
//     any count and length that the module returns.
//
// The function list has to be the same. p11-kit-client.so and p11-kit-proxy.so make
// another module, with its own sessions, at each call of C_GetFunctionList.
//
// By the standard one caller at a time uses a session. The callers have to ensure that.
type library struct {
	ctx    *pkcs11.Ctx
	fn     *C.struct_functions
	closed atomic.Bool // a session was closed
}

// maxAsked bounds how often a module may ask for more room.
const maxAsked = 4

// load opens the module's file. From here on, the module's code runs.
func load(path string) (*library, error) {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	C.quote_syslog()
	var reason *C.char
	handle := C.open_library(name, &reason)
	noModule := loadError("%s: it is no PKCS#11 module: it has no function C_GetFunctionList", path)
	switch {
	case reason != nil:
		// The text begins with the file that fails. This may be a file that the module
		// needs.
		return nil, loadError("%s: %s", path, strings.TrimPrefix(C.GoString(reason), path+": "))
	case handle == nil:
		return nil, noModule
	}
	ctx := pkcs11.New(path) // finds the library that is open already
	if ctx == nil {
		return nil, noModule
	}
	// The package does not export the list. The code expects it where version 1.1.2 has
	// it. The handle beside the list confirms the place, and every test of this package
	// checks it.
	var fn *C.struct_functions
	known := false
	if field := reflect.ValueOf(ctx).Elem().FieldByName("ctx"); field.Kind() == reflect.Pointer {
		known = C.function_list(field.UnsafePointer(), handle, &fn) != 0
	}
	switch {
	case known && fn == nil:
		return nil, loadError("%s: its function C_GetFunctionList fails, so it is no PKCS#11 module that can be used", path)
	case !known:
		return nil, loadError("%s: its functions are not found: this p11-agent was built with another version of its PKCS#11 library", path)
	case fn.major != 2 && fn.major != 3:
		return nil, loadError("%s: it is a module of version %d of PKCS#11; 2 and 3 are known here", path, fn.major)
	}
	return &library{ctx: ctx, fn: fn}, nil
}

// crashQuietly makes a crash end the process by its signal, without a report. A nil
// pointer in Go then does the same.
func crashQuietly() error {
	if C.crash_quietly() == 0 {
		return errors.New("the signals of a crash cannot be reset")
	}
	return nil
}

func loadError(format string, args ...any) error {
	return &wire.Error{Reason: wire.ReasonLoad, Text: "load the module " + text(fmt.Sprintf(format, args...), maxText)}
}

// maxText bounds the bytes of texts that come from outside: paths, and the dynamic
// loader's errors.
const maxText = 4096

// text makes a text of a module or the system printable as UTF-8. It drops the padding:
// blanks by the standard, NULs in practice.
func text(s string, limit int) string {
	s = s[:min(len(s), limit)]
	return strings.TrimRight(strings.ToValidUTF8(s, "\uFFFD"), " \x00")
}

// label makes a text from a CKA_LABEL. A label has no padding: blanks at its end count.
func label(b []byte) string {
	return strings.ToValidUTF8(string(b[:min(len(b), roomText)]), "\uFFFD")
}

// failed makes an error from the result of a function of the pkcs11 package.
func failed(function string, err error) error {
	if err == nil {
		return nil
	}
	if rv, ok := errors.AsType[pkcs11.Error](err); ok {
		return &wire.Error{Function: function, RV: uint64(rv)}
	}
	return &wire.Error{Function: function, Text: err.Error()}
}

// returned makes an error from the return value of a function of the module.
func returned(function string, rv C.CK_RV) error {
	if rv == wire.CKROK {
		return nil
	}
	return &wire.Error{Function: function, RV: uint64(rv)}
}

// garbage returns the error for an answer that the standard does not allow.
func garbage(function, format string, args ...any) error {
	return &wire.Error{Function: function, Text: "the module is out of order: " + fmt.Sprintf(format, args...)}
}

// code returns the CKR in err, or 0.
func code(err error) uint64 {
	if e, ok := errors.AsType[*wire.Error](err); ok {
		return e.RV
	}
	return wire.CKROK
}

// initialize calls C_Initialize. reserved is pReserved, unless it is empty.
func (l *library) initialize(reserved string) error {
	options := []pkcs11.InitializeOption{pkcs11.InitializeWithFlags(pkcs11.CKF_OS_LOCKING_OK)}
	if reserved != "" {
		// The text is never freed: the module may use it at any time.
		options = append(options, pkcs11.InitializeWithReserved(unsafe.Pointer(C.CString(reserved))))
	}
	return failed("C_Initialize", l.ctx.Initialize(options...))
}

func (l *library) finalize() error {
	return failed("C_Finalize", l.ctx.Finalize())
}

func (l *library) info() (pkcs11.Info, error) {
	info, err := l.ctx.GetInfo()
	return info, failed("C_GetInfo", err)
}

// slots lists all slots, or the slots with a token. The module looks for new slots when
// it is asked for their number (PKCS#11 v2.40 section 5.5, C_GetSlotList).
func (l *library) slots(present bool) ([]uint, error) {
	var with C.CK_BYTE
	if present {
		with = 1
	}
	return ulongs("C_GetSlotList", func(p *C.CK_ULONG, n *C.CK_ULONG) C.CK_RV {
		return C.get_slot_list(l.fn, with, p, n)
	})
}

// waitForSlotEvent waits until a token is put in or taken out. It does not tell in which
// slot. Without block it returns CKR_NO_EVENT when there is no event. If the module shuts
// down meanwhile, it returns CKR_CRYPTOKI_NOT_INITIALIZED (PKCS#11 v2.40 section 5.5,
// C_WaitForSlotEvent).
func (l *library) waitForSlotEvent(block bool) error {
	flags := C.CK_ULONG(C.CKF_DONT_BLOCK)
	if block {
		flags = 0
	}
	var slot C.CK_ULONG
	return returned("C_WaitForSlotEvent", C.wait_for_slot_event(l.fn, flags, &slot))
}

// mechanisms lists the mechanisms of the token in a slot.
func (l *library) mechanisms(slot uint) ([]uint, error) {
	return ulongs("C_GetMechanismList", func(p *C.CK_ULONG, n *C.CK_ULONG) C.CK_RV {
		return C.get_mechanism_list(l.fn, C.CK_ULONG(slot), p, n)
	})
}

// ulongs asks for the length of a list and then for the list. A list may grow between the
// two calls, and a module may want more room than it has said. Then the module says how
// much it wants (PKCS#11 v2.40 section 5.2). ulongs gives it that room, within bounds.
func ulongs(function string, call func(list, n *C.CK_ULONG) C.CK_RV) ([]uint, error) {
	var asked C.CK_ULONG
	for range maxAsked {
		var n C.CK_ULONG
		// Some modules answer the question for the length with
		// CKR_BUFFER_TOO_SMALL (Gemalto's, according to miekg/pkcs11).
		if rv := call(nil, &n); rv != wire.CKROK && rv != wire.CKRBufferTooSmall {
			return nil, returned(function, rv)
		}
		n = max(n, asked)
		if n > wire.MaxList {
			return nil, garbage(function, "it lists %d of them; the limit is %d", n, wire.MaxList)
		}
		if n == 0 {
			return nil, nil
		}
		list := make([]uint, n)
		rv := call((*C.CK_ULONG)(unsafe.Pointer(&list[0])), &n)
		if rv == wire.CKRBufferTooSmall {
			asked = n
			continue
		}
		if rv != wire.CKROK {
			return nil, returned(function, rv)
		}
		if n > C.CK_ULONG(len(list)) {
			return nil, garbage(function, "it lists more than it was asked for")
		}
		return list[:n], nil
	}
	return nil, garbage(function, "the list keeps growing")
}

func (l *library) slotInfo(slot uint) (pkcs11.SlotInfo, error) {
	info, err := l.ctx.GetSlotInfo(slot)
	return info, failed("C_GetSlotInfo", err)
}

// tokenInfo reads the token's texts and state in a slot.
func (l *library) tokenInfo(slot uint) (wire.TokenID, wire.TokenInfo, error) {
	info, err := l.ctx.GetTokenInfo(slot)
	if err != nil {
		return wire.TokenID{}, wire.TokenInfo{}, failed("C_GetTokenInfo", err)
	}
	id := wire.TokenID{
		Label:        text(info.Label, maxText),
		Manufacturer: text(info.ManufacturerID, maxText),
		Model:        text(info.Model, maxText),
		Serial:       text(info.SerialNumber, maxText),
	}
	state := wire.TokenInfo{
		Flags:       uint64(info.Flags),
		MaxSessions: uint64(info.MaxSessionCount),
		MinPIN:      uint64(info.MinPinLen),
		MaxPIN:      uint64(info.MaxPinLen),
	}
	if info.MaxSessionCount == ^uint(0) { // CK_UNAVAILABLE_INFORMATION
		state.MaxSessions = 0
	}
	return id, state, nil
}

func (l *library) mechanismInfo(slot, mechanism uint) (pkcs11.MechanismInfo, error) {
	info, err := l.ctx.GetMechanismInfo(slot, []*pkcs11.Mechanism{{Mechanism: mechanism}})
	return info, failed("C_GetMechanismInfo", err)
}

// openSession opens a read-only session.
func (l *library) openSession(slot uint) (pkcs11.SessionHandle, error) {
	s, err := l.ctx.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
	return s, failed("C_OpenSession", err)
}

func (l *library) closeSession(s pkcs11.SessionHandle) error {
	err := failed("C_CloseSession", l.ctx.CloseSession(s))
	if err == nil {
		l.closed.Store(true)
	}
	return err
}

func (l *library) sessionInfo(s pkcs11.SessionHandle) (pkcs11.SessionInfo, error) {
	info, err := l.ctx.GetSessionInfo(s)
	return info, failed("C_GetSessionInfo", err)
}

// login calls C_Login without a copy of pin. pin is nil if a person types the PIN on the
// reader.
func (l *library) login(s pkcs11.SessionHandle, user uint, pin []byte) error {
	return returned("C_Login", C.login(l.fn, C.CK_ULONG(s), C.CK_ULONG(user), first(pin), C.CK_ULONG(len(pin))))
}

// initToken calls C_InitToken (PKCS#11 v2.40 section 5.5) without a copy of the PIN.
func (l *library) initToken(slot uint, pin []byte, label string) error {
	padded := []byte(fmt.Sprintf("%-32s", label)) // blanks, and no NUL at the end
	return returned("C_InitToken", C.init_token(l.fn, C.CK_ULONG(slot), first(pin), C.CK_ULONG(len(pin)), first(padded)))
}

// initPIN calls C_InitPIN (PKCS#11 v2.40 section 5.5) without a copy of the PIN.
func (l *library) initPIN(s pkcs11.SessionHandle, pin []byte) error {
	return returned("C_InitPIN", C.init_pin(l.fn, C.CK_ULONG(s), first(pin), C.CK_ULONG(len(pin))))
}

func (l *library) logout(s pkcs11.SessionHandle) error {
	return failed("C_Logout", l.ctx.Logout(s))
}

// find lists the objects that have all of these attributes, at most so many. more tells
// that others exist. After an error the session may still search: close it.
func (l *library) find(s pkcs11.SessionHandle, most int, template ...*pkcs11.Attribute) (found []pkcs11.ObjectHandle, more bool, err error) {
	if err := l.ctx.FindObjectsInit(s, template); err != nil {
		return nil, false, failed("C_FindObjectsInit", err)
	}
	var batch [256]C.CK_ULONG
	seen := make(map[C.CK_ULONG]bool)
	for !more {
		var n C.CK_ULONG
		if rv := C.find_objects(l.fn, C.CK_ULONG(s), &batch[0], C.CK_ULONG(len(batch)), &n); rv != wire.CKROK {
			return nil, false, returned("C_FindObjects", rv)
		}
		if n > C.CK_ULONG(len(batch)) {
			return nil, false, garbage("C_FindObjects", "it finds more than it was asked for")
		}
		if n == 0 {
			break
		}
		for _, object := range batch[:n] {
			if seen[object] {
				return nil, false, garbage("C_FindObjects", "it finds an object twice")
			}
			if more = len(found) == most; more {
				break
			}
			seen[object] = true
			found = append(found, pkcs11.ObjectHandle(object))
		}
	}
	return found, more, failed("C_FindObjectsFinal", l.ctx.FindObjectsFinal(s))
}

// An attribute is the kind of an attribute to read, and the most bytes that it may have.
type attribute struct {
	kind uint // CKA
	room int
}

// Rooms for attributes that are not byte strings.
const (
	roomBool  = 1
	roomULong = int(unsafe.Sizeof(C.CK_ULONG(0)))
)

// poison fills the room for attributes. It shows which bytes the module has not written.
// It is no valid CK_BBOOL.
const poison = 0xa5

// attributes reads attributes of an object. A value is nil if the object lacks the
// attribute, if the token refuses to give it, or if it is longer than its room.
//
// By the standard one call tells all of this (PKCS#11 v2.40 section 5.7,
// C_GetAttributeValue). Some modules stop at the first attribute that they do not have.
// For them, attributes reads the later attributes one by one. It does the same for
// modules that want more room.
func (l *library) attributes(s pkcs11.SessionHandle, object pkcs11.ObjectHandle, wanted []attribute) ([][]byte, error) {
	values := make([][]byte, len(wanted))
	all := l.attributesOnce(s, object, wanted, values)
	if all == wire.CKROK {
		return values, nil
	}
	if !partial(all) {
		return nil, returned("C_GetAttributeValue", all)
	}
	for i, v := range values {
		var rv C.CK_RV
		switch untouched := v != nil && !slices.ContainsFunc(v, func(b byte) bool { return b != poison }); {
		case untouched:
			rv = l.attributesOnce(s, object, wanted[i:i+1], values[i:i+1])
			if rv == wire.CKRBufferTooSmall {
				values[i], rv = l.longAttribute(s, object, wanted[i])
			}
		case v == nil && all == wire.CKRBufferTooSmall:
			values[i], rv = l.longAttribute(s, object, wanted[i])
		}
		switch {
		case partial(rv):
			values[i] = nil
		case rv != wire.CKROK:
			return nil, returned("C_GetAttributeValue", rv)
		}
	}
	return values, nil
}

// longAttribute reads one attribute with the room that the module asks for, up to
// roomObject. The attribute counts as missing if the module asks for more, or if the
// value is longer than it may be.
func (l *library) longAttribute(s pkcs11.SessionHandle, object pkcs11.ObjectHandle, wanted attribute) ([]byte, C.CK_RV) {
	asked := C.CK_ULONG(0)
	rv := C.attribute_length(l.fn, C.CK_ULONG(s), C.CK_ULONG(object), C.CK_ULONG(wanted.kind), &asked)
	switch {
	case rv != wire.CKROK && rv != wire.CKRBufferTooSmall:
		return nil, rv
	case asked <= C.CK_ULONG(wanted.room): // the module does not say how much it wants
		asked = roomObject
	case asked > roomObject:
		return nil, wire.CKRBufferTooSmall
	}
	var value [1][]byte
	rv = l.attributesOnce(s, object, []attribute{{wanted.kind, int(asked)}}, value[:])
	if len(value[0]) > wanted.room {
		return nil, wire.CKRBufferTooSmall
	}
	return value[0], rv
}

// partial tells whether C_GetAttributeValue has returned the attributes that it could.
func partial(rv C.CK_RV) bool {
	switch rv {
	case pkcs11.CKR_ATTRIBUTE_SENSITIVE, wire.CKRAttributeTypeInvalid, wire.CKRBufferTooSmall:
		return true
	}
	return false
}

// arenas holds memory for the values of C_GetAttributeValue. Each object of a list needs
// an arena with room for much more than its values.
var arenas = sync.Pool{New: func() any { return new([]byte) }}

// attributesOnce makes one call of C_GetAttributeValue.
func (l *library) attributesOnce(s pkcs11.SessionHandle, object pkcs11.ObjectHandle, wanted []attribute, values [][]byte) C.CK_RV {
	types := make([]C.CK_ULONG, len(wanted))
	lengths := make([]C.CK_ULONG, len(wanted))
	size := 0
	for i, w := range wanted {
		types[i], lengths[i] = C.CK_ULONG(w.kind), C.CK_ULONG(w.room)
		size += w.room
	}
	reused := arenas.Get().(*[]byte)
	defer arenas.Put(reused)
	if len(*reused) < size {
		*reused = make([]byte, size)
	}
	arena := (*reused)[:size]
	for i := range arena {
		arena[i] = poison
	}
	rv := C.get_attributes(l.fn, C.CK_ULONG(s), C.CK_ULONG(object), C.CK_ULONG(len(wanted)),
		&types[0], &lengths[0], first(arena))
	for i, w := range wanted {
		values[i] = nil
		if lengths[i] <= C.CK_ULONG(w.room) { // otherwise it is missing, or the length is wrong
			values[i] = append([]byte{}, arena[:lengths[i]]...)
		}
		arena = arena[w.room:]
	}
	return rv
}

// signInit calls C_SignInit (PKCS#11 v2.40 section 5.11).
func (l *library) signInit(s pkcs11.SessionHandle, kind uint64, params *wire.Params, key pkcs11.ObjectHandle) error {
	return returned("C_SignInit", C.sign_init(l.fn, C.CK_ULONG(s), C.CK_ULONG(kind), C.CK_ULONG(key),
		C.CK_ULONG(params.Hash), C.CK_ULONG(params.MGF), C.CK_ULONG(params.Salt)))
}

// decryptInit calls C_DecryptInit (PKCS#11 v2.40 section 5.9).
func (l *library) decryptInit(s pkcs11.SessionHandle, kind uint64, params *wire.Params, key pkcs11.ObjectHandle) error {
	return returned("C_DecryptInit", C.decrypt_init(l.fn, C.CK_ULONG(s), C.CK_ULONG(kind), C.CK_ULONG(key),
		C.CK_ULONG(params.Hash), C.CK_ULONG(params.MGF), first(params.Source), C.CK_ULONG(len(params.Source))))
}

// sign calls C_Sign for a signature that is not longer than room. If the module wants
// more room, sign gives it the room, up to maxResult. The operation is still active
// then (PKCS#11 v2.40 section 5.2). So sign begins nothing anew and needs no PIN.
func (l *library) sign(s pkcs11.SessionHandle, data, room []byte) (signature []byte, err error) {
	return l.finish(wire.Sign, s, data, room)
}

// decrypt calls C_Decrypt, as sign calls C_Sign. The plaintext may be empty. The caller
// wipes it, and room after an error.
func (l *library) decrypt(s pkcs11.SessionHandle, data, room []byte) (plaintext []byte, err error) {
	return l.finish(wire.Decrypt, s, data, room)
}

func (l *library) finish(function wire.Function, s pkcs11.SessionHandle, data, room []byte) ([]byte, error) {
	name := "C_Sign"
	if function == wire.Decrypt {
		name = "C_Decrypt"
	}
	most := C.CK_ULONG(len(room))
	for range maxAsked {
		var made C.struct_output
		if function == wire.Decrypt {
			made = C.decrypt(l.fn, C.CK_ULONG(s), first(data), C.CK_ULONG(len(data)), first(room), C.CK_ULONG(len(room)))
		} else {
			made = C.sign(l.fn, C.CK_ULONG(s), first(data), C.CK_ULONG(len(data)), first(room), C.CK_ULONG(len(room)))
		}
		switch n := made.length; {
		case made.rv == wire.CKRBufferTooSmall && n <= maxResult && len(room) < maxResult:
			if n <= C.CK_ULONG(len(room)) { // the module does not say how much it wants
				n = maxResult
			}
			room = make([]byte, n)
		case made.rv != wire.CKROK:
			return nil, returned(name, made.rv)
		case n == 0 && function == wire.Sign || n > most:
			if function.Secret() {
				clear(room)
			}
			return nil, garbage(name, "the result has %d bytes; there is room for %d", n, most)
		default:
			return room[:n], nil
		}
	}
	return nil, garbage(name, "it keeps asking for more room than the %d bytes that it was given", len(room))
}

// errLeft means that the session still has the object with a derived secret. The result
// is good, but the session must be closed, which destroys the object (PKCS#11 v2.40
// section 5.6, C_CloseSession).
var errLeft = errors.New("the derived key is left in the session")

// derive calls C_DeriveKey (PKCS#11 v2.40 section 5.13), and fills room with the value
// of the new key. peer is the point of the other party, uncompressed (section 2.3.8,
// CK_ECDH1_DERIVE_PARAMS). The caller wipes room. With errLeft, the result is good.
func (l *library) derive(s pkcs11.SessionHandle, kind uint64, key pkcs11.ObjectHandle, peer, room []byte) ([]byte, error) {
	d := C.derive(l.fn, C.CK_ULONG(s), C.CK_ULONG(kind), C.CK_ULONG(key), first(peer), C.CK_ULONG(len(peer)),
		first(room), C.CK_ULONG(len(room)))
	switch {
	case d.derive != wire.CKROK:
		return nil, returned("C_DeriveKey", d.derive)
	case d.read != wire.CKROK:
		return nil, returned("C_GetAttributeValue", d.read)
	case d.length != C.CK_ULONG(len(room)):
		return nil, garbage("C_GetAttributeValue", "the derived secret has %d bytes in place of %d", d.length, len(room))
	case d.destroy != wire.CKROK:
		return room, errLeft
	}
	return room, nil
}

// first returns the address of b for C, or NULL if b is empty.
func first(b []byte) *C.CK_BYTE {
	if len(b) == 0 {
		return nil
	}
	return (*C.CK_BYTE)(unsafe.Pointer(&b[0]))
}
