// Package wire is the language between the agent and its module processes: the
// frames on their socket pair and the messages in them.
//
// A frame is
//
//	uint32  length of what follows
//	byte    type
//	uint32  id
//	byte[]  body, a message of this package in the encoding of RFC 4251 section 5
//
// The agent numbers its requests; the answer carries the number of its request,
// and answers come in any order. Number 0 is for messages that answer no request.
// Neither side believes the other: lengths are bounded, lists are bounded, and
// a message that does not parse ends the connection.
//
// Numbers of PKCS#11 (CKR, CKM, CKF, CKO, CKK) cross as they are; object and
// session handles never do.
package wire

import "p11-agent/pinentry/secret"

// Version is the version of this language. Both sides are the same binary, so a
// difference means that the binary was replaced while the agent ran.
const Version = 6

// FD is the file descriptor number that a module process finds its socket at.
const FD = 3

const (
	// MaxRequest bounds the body of a frame towards the module process: the
	// largest holds the data of one signature, which reached the agent in a
	// message of 256 KiB at most.
	MaxRequest = 512 << 10
	// MaxReply bounds the body of a frame from the module process.
	MaxReply = 16 << 20
	// MaxList bounds the elements of each list in a frame: slots, mechanisms, objects.
	MaxList = 8192
	// MaxObjects and MaxObjectBytes bound the objects of one token that a module
	// process lists, in all frames together. Named objects come on top, up to
	// MaxNamedObjects and MaxNamedBytes.
	MaxObjects      = 4 * MaxList
	MaxObjectBytes  = 16 << 20
	MaxNamedObjects = MaxList
	MaxNamedBytes   = 2 << 20
	// MaxNames bounds the names that one request for objects searches for.
	MaxNames = 1024
	// MaxText bounds the bytes of a text: a label, a name, what went wrong. A URI, which
	// may have a label, has as many at the most.
	MaxText = 8 << 10
	// MaxPIN bounds the bytes of a PIN. Tokens take 4 to 255.
	MaxPIN = 1024
)

// Type tells what a frame holds.
type Type byte

// The requests. Each is answered by one frame: its reply type or TypeError.
const (
	TypeHello    Type = 1  // Hello -> HelloReply
	TypeSlots    Type = 2  // Slots -> SlotsReply
	TypeObjects  Type = 3  // Objects -> ObjectsReply
	TypeToken    Type = 4  // Token -> TokenReply
	TypeLogin    Type = 5  // Login -> TokenReply; the body may only lie in locked memory
	TypeLogout   Type = 6  // Token -> TokenReply
	TypeSign     Type = 7  // Sign -> SignReply; the body may only lie in locked memory when it holds a PIN
	TypeCancel   Type = 8  // Cancel; no reply of its own
	TypeGenerate Type = 9  // Generate -> GenerateReply
	TypeNewToken Type = 10 // NewToken -> NewTokenReply; the body may only lie in locked memory
)

// The answers.
const (
	TypeReply Type = 64 // the reply message that belongs to the request
	TypeError Type = 65 // Error
	TypePart  Type = 68 // ObjectsPart: a part of the answer to TypeObjects; the reply follows
	TypeEvent Type = 66 // Event or an empty body, id 0: slots or tokens have changed
	TypeLost  Type = 67 // Error, id 0: the module is of no use any more, and a new process is wanted
)

// Hello opens the conversation: it is the first frame, and the module is loaded
// only now.
type Hello struct {
	Version uint32
	Path    string // absolute path of the module's file
	// InitArgs is handed to C_Initialize as pReserved when not empty
	// (x-init-reserved of p11-kit's configuration).
	InitArgs string
	// Poll has the slots be looked at again and again, and keeps the process from
	// waiting in C_WaitForSlotEvent: see ReasonOneAtATime.
	Poll bool
	// Unconfined has the process not confine itself. Write are files and
	// directories, absolute, that the module may write besides those that it is known
	// to.
	Unconfined bool
	Write      []string
}

// HelloReply describes the module, as C_GetInfo does. Texts have lost their
// padding.
type HelloReply struct {
	Version      uint32
	Manufacturer string
	Description  string
	Library      uint32 // library version: major<<8 | minor
	Cryptoki     uint32 // PKCS#11 version: major<<8 | minor
	Waits        bool   // the module itself tells when tokens come and go
	Sandbox      Sandbox
}

// Sandbox tells how far a module process has confined itself: what is in force,
// and of the rest why it is not.
type Sandbox struct {
	Off bool // it was told not to
	// Files is the version of Landlock that keeps it from writing files, 0 for none;
	// then FilesError says why. Missing are those of Hello.Write that were not there,
	// and so cannot be written.
	Files      uint32
	FilesError string
	Missing    []string
	// Scoped tells that Landlock keeps it from signalling processes that it has not
	// started, and from connecting to their abstract sockets.
	Scoped bool
	// Calls tells that seccomp keeps it from making system calls, among them those that
	// send signals if not Scoped; CallsError says why not.
	Calls      bool
	CallsError string
}

// Slots asks for the slots and the tokens in them.
type Slots struct {
	// Reinitialize calls C_Finalize and C_Initialize first, for modules that
	// notice new tokens in no other way. The module process leaves that
	// out, without an error, during a login or another request. If a thread of the
	// process waits for events in the module, the answer is ReasonRenew.
	Reinitialize bool
}

// Event tells that slots or tokens have changed. An empty one has no body.
type Event struct {
	Gone []SlotID // the slots that have lost their token since the last Event or SlotsReply
}

// SlotID names a slot.
type SlotID struct{ ID uint64 }

// SlotsReply lists the slots, those without a token too.
type SlotsReply struct {
	Slots []Slot
	// PCSC tells that the module sees smart cards by pcscd.
	PCSC bool
}

// A Slot is a slot and the token in it (PKCS#11 v2.40 section 4.3, CK_SLOT_INFO
// and CK_TOKEN_INFO). Texts have lost their padding.
type Slot struct {
	ID           uint64
	Description  string
	Manufacturer string
	Flags        uint64 // CKF of the slot
	HasToken     bool   // the fields below are set: there is an initialised token
	Token        TokenID
	Info         TokenInfo
	Mechanisms   []Mechanism
}

// TokenID names a token by what is printed on it, so to speak, wherever it is
// plugged in.
type TokenID struct {
	Label        string
	Manufacturer string
	Model        string
	Serial       string
	// Twin tells tokens apart whose four texts are the same. The agent numbers them by
	// their keys; the first has 0. A module process takes the number as it is.
	Twin uint32
}

// Texts returns the name without the number.
func (t TokenID) Texts() TokenID {
	t.Twin = 0
	return t
}

// TokenInfo is what changes during a token's life.
type TokenInfo struct {
	Flags       uint64 // CKF of the token
	MaxSessions uint64 // 0: no limit known
	MinPIN      uint64
	MaxPIN      uint64
	// LoggedIn tells whether the user is logged in, as far as this process knows.
	LoggedIn bool
	// Stay numbers the stays of tokens in slots that this process has seen: a token that
	// was taken out and put in again has another number. 0: it was not looked for yet.
	Stay uint64
}

// A Mechanism is one the token can sign with (CKF_SIGN), with its key sizes.
type Mechanism struct {
	Type           uint64
	MinKey, MaxKey uint64
}

// Objects asks for the keys and certificates that are visible now. It also tells in
// which slot the token is: from then on the process uses the token in that slot alone.
type Objects struct {
	Token TokenID
	// Slot counts when Placed is set. Otherwise the process looks for the token in all
	// slots.
	Slot   uint64
	Placed bool
	// Peek reads the objects of any token with these texts in the slot, and
	// remembers nothing of it.
	Peek bool
	// Named are objects that a URI names. The module process searches for each
	// of them when the token has more objects than it lists.
	Named []ObjectName
}

// An ObjectName is what a URI says of an object. An empty field says nothing, and one
// field at least is not empty.
type ObjectName struct {
	ID    []byte
	Label string
}

// ObjectsPart lists some of the objects. The module process sends any number of parts
// before the reply, so that a long list is no hang.
type ObjectsPart struct {
	// First has the receiver forget the parts before this one: the login has changed
	// meanwhile, and the list begins again.
	First   bool
	Objects []Object
}

// ObjectsReply lists the last of the objects.
type ObjectsReply struct {
	Info    TokenInfo
	Objects []Object
	// Cut tells that the token has more objects than MaxObjects and MaxObjectBytes let
	// the module process list.
	Cut bool
	// Long is how many certificates are listed without their value, because it has more
	// bytes than the module process reads.
	Long uint32
}

// An Object is a public key, a private key or an X.509 certificate. Attributes
// that the token does not give are empty.
type Object struct {
	Class   uint64 // CKO_PUBLIC_KEY, CKO_PRIVATE_KEY, CKO_CERTIFICATE
	ID      []byte
	Label   string
	KeyType uint64 // CKK, keys only

	Modulus, Exponent []byte // RSA
	ECParams, ECPoint []byte // EC and Edwards: as the token gives them
	Value             []byte // certificates: DER

	Sign         Tri // CKA_SIGN of a private, CKA_VERIFY of a public key
	Private      Tri // CKA_PRIVATE
	AlwaysAuth   Tri // CKA_ALWAYS_AUTHENTICATE
	Trusted      Tri // CKA_TRUSTED, certificates
	CertCategory uint64
}

// Tri is a boolean attribute that a token may keep to itself.
type Tri uint8

// The values of a Tri.
const (
	Unknown Tri = iota
	False
	True
)

// Token asks for the state of one token (fresh from C_GetTokenInfo), or to log
// out of it.
type Token struct {
	Token TokenID
}

// TokenReply answers with it.
type TokenReply struct {
	Info TokenInfo
}

// Login logs the user in. Before the PIN goes to the token the module process
// reads the token's identity and flags once more and refuses when it is another
// token, when the PIN is locked, or when this is the last try and LastTry is
// not set: a PIN is never tried on a token it was not given for.
type Login struct {
	Token TokenID
	// Stay is the stay that the PIN is for (TokenInfo.Stay). The process refuses the PIN
	// when another stay has begun. 0: any stay.
	Stay    uint64
	LastTry bool
	// Pad has the person type the PIN on the reader itself: C_Login with a null
	// PIN, for CKF_PROTECTED_AUTHENTICATION_PATH.
	Pad bool
	// PIN is nil with Pad. It is sent right out of its locked memory, and never
	// lies in other memory of the receiver, who wipes it.
	PIN *secret.Secret
}

// Sign asks for one signature.
type Sign struct {
	Key       KeyID
	Mechanism uint64 // CKM
	// PSSHash, PSSMGF and PSSSalt are the parameters of CKM_RSA_PKCS_PSS and its
	// kin (CK_RSA_PKCS_PSS_PARAMS), 0 otherwise.
	PSSHash, PSSMGF, PSSSalt uint64
	SignatureLen             uint32 // bytes to expect at most: known from key and mechanism
	Data                     []byte
	// ContextLogin has C_Login(CKU_CONTEXT_SPECIFIC) done with PIN between
	// C_SignInit and C_Sign, for CKA_ALWAYS_AUTHENTICATE; LastTry and Pad as in
	// Login.
	ContextLogin bool
	Stay         uint64 // for ContextLogin, as in Login
	LastTry      bool
	Pad          bool
	PIN          *secret.Secret
}

// KeyID names a private key: the token it is on, its CKA_ID, and its public
// half, which decides when several keys have the same ID.
type KeyID struct {
	Token   TokenID
	ID      []byte
	Label   string
	KeyType uint64 // CKK
	Modulus []byte // RSA
	ECPoint []byte // EC and Edwards: the point itself, without an OCTET STRING around it
	// Any tells that ID and Label are not those of the private key: any private key counts
	// that does not show another public half. A signature tells which one it is.
	Any bool
}

// SignReply holds the signature as the token gave it: RSA as it is, ECDSA as r
// and s side by side, EdDSA as it is.
type SignReply struct {
	Signature []byte
}

// Generate asks for a new key pair on a token with a login. The module process makes
// the pair only if no key or certificate has its ID, and no key its label. The private
// key can never leave the token. After a Cancel, the module process destroys the pair.
type Generate struct {
	Token     TokenID
	Mechanism uint64 // CKM, to make a pair
	Bits      uint32 // RSA: of the modulus; 0 otherwise
	// ECParams are values of CKA_EC_PARAMS that mean the same curve, to be tried one
	// after the other.
	ECParams []Value
	ID       []byte // empty: one that is free
	Label    string
	// Check makes no pair. It finds out, without a login, whether the ID or the label is
	// taken by what is visible, and whether the token makes such pairs. The reply is empty.
	Check bool
}

// Value is the value of an attribute.
type Value struct{ Bytes []byte }

// GenerateReply tells of the pair that was made. The private key was read back:
// it is sensitive and cannot be extracted.
type GenerateReply struct {
	Public, Private Object
	// What the token says of the private key's life so far (CKA_ALWAYS_SENSITIVE,
	// CKA_NEVER_EXTRACTABLE, CKA_LOCAL).
	AlwaysSensitive, NeverExtractable, Local Tri
}

// NewToken asks the module to make a token in a slot whose token has none yet. A token
// that is initialised is never touched. The module process makes up the PIN of the
// security officer and forgets it.
type NewToken struct {
	Label string // 32 bytes at the most
	// PIN is the user's. It is sent right out of its locked memory, and never copied
	// anywhere else.
	PIN *secret.Secret
}

// NewTokenReply names the token that was made.
type NewTokenReply struct {
	Token TokenID
}

// Cancel says that the agent no longer waits for the request with this number. A request
// that has not reached the module yet is dropped: its answer is an Error with
// CKRFunctionCanceled. A request in the module goes on.
type Cancel struct {
	Request uint32
}

// Error says that a request failed. It is an error to be returned by both
// sides.
type Error struct {
	Function string // what was called: "C_Login", or empty when it did not come to that
	RV       uint64 // what it returned (CKR), or 0
	Reason   Reason
	Text     string // for a person; no secret, no handle
	// Info holds the token's state after a failed login, and when no key was
	// found, as far as it could be read (HasInfo): without a login,
	// private keys may be invisible.
	HasInfo bool
	Info    TokenInfo
}

// Reason is why the module process itself refused.
type Reason uint32

// The reasons.
const (
	ReasonModule      Reason = 0 // the module said no: see RV
	ReasonLoad        Reason = 1 // the file cannot be loaded
	ReasonNoToken     Reason = 2 // no such token is present
	ReasonOtherToken  Reason = 3 // another token is in that slot by now
	ReasonNoKey       Reason = 4 // no such private key is visible
	ReasonPINLocked   Reason = 5 // the token's PIN is locked: it was not tried
	ReasonLastTry     Reason = 6 // one try is left and LastTry was not set: it was not tried
	ReasonProtocol    Reason = 7 // the request makes no sense
	ReasonAmbiguous   Reason = 8 // two private keys fit
	ReasonUnsupported Reason = 9 // this module process does not do that
	// ReasonOneAtATime: the module answers nothing else while a thread waits in
	// C_WaitForSlotEvent. This process is lost; the next is to be told to Poll.
	ReasonOneAtATime Reason = 10
	// ReasonRenew: a new process is wanted in place of C_Finalize and C_Initialize.
	// Nothing is under way in this one, and nothing reaches the module any more.
	ReasonRenew  Reason = 11
	ReasonExists Reason = 12 // a key or certificate of that ID or label is there: none was made
	// ReasonExtractable: the token made a key that could leave it, or does not say
	// that it cannot. Text tells what became of the pair.
	ReasonExtractable Reason = 13
	// ReasonPulled: a token was put in or taken out, and the module has answered nothing
	// since, though a request waits for it. This process is lost.
	ReasonPulled Reason = 14
)

// lastReason is the last that is known.
const lastReason = ReasonPulled
