// Package wire defines the protocol between the agent and its module processes: the
// frames on their socket pair, and the messages in the frames.
//
// A frame is
//
//	uint32  length of what follows
//	byte    type
//	uint32  id
//	byte[]  body, a message of this package in the encoding of RFC 4251 section 5
//
// The agent numbers its requests. An answer carries the number of its request, and
// answers come in any order. Number 0 is for messages that answer no request. Neither
// side trusts the other: lengths and lists are bounded, and a message that does not parse
// ends the connection.
//
// Numbers of PKCS#11 (CKR, CKM, CKF, CKO, CKK) cross unchanged. Object and session
// handles never cross.
package wire

import (
	"cmp"
	"fmt"

	"p11-agent/pinentry/secret"
)

// Version is the version of this protocol. Both sides run the same binary. So a
// difference means that the binary was replaced while the agent ran.
const Version = 7

// FD is the file descriptor number of the socket in a module process.
const FD = 3

const (
	// MaxRequest bounds the bytes of a request's body. The largest request holds the data
	// of one signature. The data reach the agent in a message of at most 256 KiB.
	MaxRequest = 512 << 10
	// MaxReply bounds the bytes of the body of a frame from the module process.
	MaxReply = 16 << 20
	// MaxList bounds the elements of each list in a frame: slots, mechanisms, objects.
	MaxList = 8192
	// MaxObjects and MaxObjectBytes bound the objects of one token that a module process
	// lists, in all frames together. For named objects, the module process may list
	// MaxNamedObjects and MaxNamedBytes more.
	MaxObjects      = 4 * MaxList
	MaxObjectBytes  = 16 << 20
	MaxNamedObjects = MaxList
	MaxNamedBytes   = 2 << 20
	// MaxNames bounds the names that the module process searches for in one request for
	// objects.
	MaxNames = 1024
	// MaxText bounds the bytes of a text: a label, a name, a description of an error. A
	// URI may hold a label, and has no more bytes than this.
	MaxText = 8 << 10
	// MaxPIN bounds the bytes of a PIN. Tokens take 4 to 255.
	MaxPIN = 1024
)

// Type tells what a frame holds.
type Type byte

// The requests. One frame answers each of them: its reply type or TypeError.
const (
	TypeHello    Type = 1  // Hello -> HelloReply
	TypeSlots    Type = 2  // Slots -> SlotsReply
	TypeObjects  Type = 3  // Objects -> ObjectsReply
	TypeToken    Type = 4  // Token -> TokenReply
	TypeLogin    Type = 5  // Login -> TokenReply; keep the body in locked memory only
	TypeLogout   Type = 6  // Token -> TokenReply
	TypeOperate  Type = 7  // Operate -> OperateReply; keep a body with a PIN in locked memory only
	TypeCancel   Type = 8  // Cancel; it has no reply
	TypeGenerate Type = 9  // Generate -> GenerateReply
	TypeNewToken Type = 10 // NewToken -> NewTokenReply; keep the body in locked memory only
)

// The answers.
const (
	TypeReply Type = 64 // the reply message that belongs to the request
	TypeError Type = 65 // Error
	TypePart  Type = 68 // ObjectsPart: a part of the answer to TypeObjects; the reply follows
	TypeEvent Type = 66 // Event or an empty body, id 0: slots or tokens have changed
	TypeLost  Type = 67 // Error, id 0: the module is of no further use; start a new process
)

// Hello opens the conversation. It is the first frame. The module process loads the
// module only when Hello arrives.
type Hello struct {
	Version uint32
	Path    string // absolute path of the module's file
	// InitArgs is pReserved of C_Initialize when it is not empty (x-init-reserved of
	// p11-kit's configuration).
	InitArgs string
	// Poll makes the process look at the slots again and again. The process then does not
	// wait in C_WaitForSlotEvent: see ReasonOneAtATime.
	Poll bool
	// If Unconfined is set, the process does not confine itself. Write are more files and
	// directories that the module may write, besides those that the sandbox knows. They
	// are absolute paths.
	Unconfined bool
	Write      []string
}

// HelloReply describes the module, as C_GetInfo does. The texts have no padding.
type HelloReply struct {
	Version      uint32
	Manufacturer string
	Description  string
	Library      uint32 // library version: major<<8 | minor
	Cryptoki     uint32 // PKCS#11 version: major<<8 | minor
	Waits        bool   // the module itself tells when tokens come and go
	Sandbox      Sandbox
}

// Sandbox tells how far a module process has confined itself: which parts are in force,
// and why the other parts are not.
type Sandbox struct {
	Off bool // Hello.Unconfined was set
	// Files is the version of Landlock that keeps the process from writing files. If it
	// is 0, Landlock is not in force and FilesError says why. Missing are the paths of
	// Hello.Write that did not exist. The module cannot write them.
	Files      uint32
	FilesError string
	Missing    []string
	// Scoped tells that Landlock keeps the process from signalling processes that it has
	// not started, and from connecting to their abstract sockets.
	Scoped bool
	// Calls tells that seccomp denies system calls. If Scoped is not set, these include
	// calls that send signals. CallsError says why seccomp is not in force.
	Calls      bool
	CallsError string
}

// Slots asks for the slots and the tokens in them.
type Slots struct {
	// Reinitialize makes the process call C_Finalize and C_Initialize first. It is for
	// modules that notice new tokens in no other way. During a login or another request,
	// the process omits the two calls, without an error. If a thread of the process waits
	// for events in the module, the answer is ReasonRenew.
	Reinitialize bool
}

// Event tells that slots or tokens have changed. An empty Event has no body.
type Event struct {
	Gone []SlotID // the slots that have lost their token since the last Event or SlotsReply
}

// SlotID names a slot.
type SlotID struct{ ID uint64 }

// SlotsReply lists the slots, including slots without a token.
type SlotsReply struct {
	Slots []Slot
	// PCSC tells that the module sees smart cards through pcscd.
	PCSC bool
}

// A Slot is a slot and the token in it (PKCS#11 v2.40 section 4.3, CK_SLOT_INFO and
// CK_TOKEN_INFO). The texts have no padding.
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

// TokenID names a token by its own texts. It stays the same in every slot.
type TokenID struct {
	Label        string
	Manufacturer string
	Model        string
	Serial       string
	// Twin distinguishes tokens with the same four texts. The agent numbers them by their
	// keys, from 0. A module process does not change the number.
	Twin uint32
}

// Compare orders tokens by their texts, and then by their numbers.
func (t TokenID) Compare(o TokenID) int {
	return cmp.Or(cmp.Compare(t.Label, o.Label), cmp.Compare(t.Serial, o.Serial),
		cmp.Compare(t.Manufacturer, o.Manufacturer), cmp.Compare(t.Model, o.Model), cmp.Compare(t.Twin, o.Twin))
}

// Texts returns the name without the number.
func (t TokenID) Texts() TokenID {
	t.Twin = 0
	return t
}

// TokenInfo holds the values that change during a token's life.
type TokenInfo struct {
	Flags       uint64 // CKF of the token
	MaxSessions uint64 // 0: no limit known
	MinPIN      uint64
	MaxPIN      uint64
	// LoggedIn tells whether the user is logged in, as far as the module process knows.
	LoggedIn bool
	// Stay numbers the stays of tokens in slots. A token that is taken out and put in
	// again has another number. 0 means that the module process has not looked for the
	// token yet.
	Stay uint64
}

// A Mechanism is a mechanism with which the token signs, decrypts or derives, and its key
// sizes (PKCS#11 v2.40 section 3.5, CK_MECHANISM_INFO).
type Mechanism struct {
	Type           uint64
	MinKey, MaxKey uint64
	Flags          uint64 // CKF of the mechanism: CKFSign and others
}

// Objects asks for the keys and certificates that are visible now. If Placed is set, it
// also tells in which slot the token is. Then the process uses the token only in that
// slot.
type Objects struct {
	Token TokenID
	// Slot counts when Placed is set. Otherwise the process looks for the token in all
	// slots.
	Slot   uint64
	Placed bool
	// Peek makes the process read the objects of any token with these texts in the slot.
	// The process remembers nothing of it.
	Peek bool
	// Named are objects that a URI names. If the token has more objects than the process
	// lists, the process searches for each of them.
	Named []ObjectName
}

// An ObjectName holds what a URI says of an object. An empty field matches every object.
// At least one field is not empty.
type ObjectName struct {
	ID    []byte
	Label string
}

// ObjectsPart lists some of the objects. The module process sends any number of parts
// before the reply. So the agent does not take a long list for a hang.
type ObjectsPart struct {
	// If First is set, the receiver drops the parts before this part. The login has
	// changed meanwhile, and the list begins again.
	First   bool
	Objects []Object
}

// ObjectsReply lists the last of the objects.
type ObjectsReply struct {
	Info    TokenInfo
	Objects []Object
	// Cut tells that the token has more objects than the module process may list: see
	// MaxObjects and MaxObjectBytes.
	Cut bool
	// Long is the number of listed certificates without a value. Their value has more
	// bytes than the module process reads.
	Long uint32
}

// An Object is a public key, a private key or an X.509 certificate. An attribute is empty
// if the token does not give it.
type Object struct {
	Class   uint64 // CKO_PUBLIC_KEY, CKO_PRIVATE_KEY, CKO_CERTIFICATE
	ID      []byte
	Label   string
	KeyType uint64 // CKK, keys only

	Modulus, Exponent []byte // RSA
	ECParams, ECPoint []byte // EC and Edwards: as the token gives them
	Value             []byte // certificates: DER

	Sign         Tri // CKA_SIGN of a private, CKA_VERIFY of a public key
	Decrypt      Tri // CKA_DECRYPT, private keys
	Derive       Tri // CKA_DERIVE, private keys
	Private      Tri // CKA_PRIVATE
	AlwaysAuth   Tri // CKA_ALWAYS_AUTHENTICATE
	Trusted      Tri // CKA_TRUSTED, certificates
	CertCategory uint64
}

// Tri is a boolean attribute that a token may refuse to give.
type Tri uint8

// The values of a Tri.
const (
	Unknown Tri = iota
	False
	True
)

// Token asks for the current state of one token (C_GetTokenInfo), or logs out of it.
type Token struct {
	Token TokenID
}

// TokenReply holds the state of the token.
type TokenReply struct {
	Info TokenInfo
}

// Login logs the user in. Before the token gets the PIN, the module process reads the
// token's identity and flags again. It refuses in three cases: the token is another
// token, the PIN is locked, or one try is left and LastTry is not set. So no token gets a
// PIN that belongs to another token.
type Login struct {
	Token TokenID
	// Stay is the stay that the PIN is for (TokenInfo.Stay). The process refuses the PIN
	// in another stay. 0 means any stay.
	Stay    uint64
	LastTry bool
	// If Pad is set, the person types the PIN on the reader: the process calls C_Login
	// with a null PIN, for CKF_PROTECTED_AUTHENTICATION_PATH.
	Pad bool
	// PIN is nil with Pad. The sender sends it straight from its locked memory. The
	// receiver keeps it in locked memory only, and wipes it.
	PIN *secret.Secret
}

// A Function is what a token does with a private key. Each Function has its own functions of
// PKCS#11 v2.40: C_Sign (section 5.11), C_Decrypt (5.9) and C_DeriveKey (5.13).
type Function uint8

// The Functions.
const (
	Sign Function = iota
	Decrypt
	Derive
)

// lastFunction is the last known Function.
const lastFunction = Derive

// String returns the verb of the Function.
func (f Function) String() string {
	switch f {
	case Sign:
		return "sign"
	case Decrypt:
		return "decrypt"
	case Derive:
		return "derive"
	}
	return fmt.Sprintf("function %d", uint8(f))
}

// Flag returns the flag (CKF) of the mechanisms that do the Function.
func (f Function) Flag() uint64 {
	switch f {
	case Sign:
		return CKFSign
	case Decrypt:
		return CKFDecrypt
	case Derive:
		return CKFDerive
	}
	return 0
}

// Secret reports whether the result of the Function is a secret.
func (f Function) Secret() bool { return f != Sign }

// Operate asks for one operation with a private key.
type Operate struct {
	Key       KeyID
	Function  Function
	Mechanism uint64 // CKM
	Params    Params
	ResultLen uint32 // bytes to expect at most: known from key and mechanism
	// Data are the data to sign, or the ciphertext. For Derive, they are the public point of
	// the other party, uncompressed, without an OCTET STRING around it.
	Data []byte
	// If ContextLogin is set, the process calls C_Login(CKU_CONTEXT_SPECIFIC) with PIN, for
	// CKA_ALWAYS_AUTHENTICATE. It does so between C_SignInit and C_Sign, between
	// C_DecryptInit and C_Decrypt, or before C_DeriveKey. LastTry and Pad are as in Login.
	ContextLogin bool
	Stay         uint64 // for ContextLogin, as in Login
	LastTry      bool
	Pad          bool
	PIN          *secret.Secret
}

// Params are the parameters of a mechanism. All are empty for a mechanism without
// parameters. CKM_ECDH1_DERIVE has none here: its key derivation function is CKD_NULL.
type Params struct {
	// Hash (CKM), MGF (CKG) and Salt (bytes) are the parameters of CKM_RSA_PKCS_PSS and
	// similar mechanisms (CK_RSA_PKCS_PSS_PARAMS). CKM_RSA_PKCS_OAEP has Hash, MGF and
	// Source (CK_RSA_PKCS_OAEP_PARAMS); an empty Source is the empty label.
	Hash, MGF, Salt uint64
	Source          []byte
}

// KeyID names a private key by its token, its CKA_ID and its public half. The public half
// decides when several keys have the same ID.
type KeyID struct {
	Token   TokenID
	ID      []byte
	Label   string
	KeyType uint64 // CKK
	Modulus []byte // RSA
	ECPoint []byte // EC and Edwards: the point itself, without an OCTET STRING around it
	// If Any is set, ID and Label are not those of the private key. Every private key
	// then counts, unless it shows another public half. A signature tells which key it
	// is.
	Any bool
}

// OperateReply holds the result as the token returned it. In an ECDSA signature, s follows r.
// The result of decrypt and derive is a secret: both sides overwrite their frames, and the
// receiver wipes Result.
type OperateReply struct {
	Result []byte
}

// Generate asks for a new key pair on a token with a login. The module process makes the
// pair only if no key or certificate has its ID, and no key has its label. The private
// key can never leave the token. After a Cancel, the module process destroys the pair.
type Generate struct {
	Token     TokenID
	Mechanism uint64 // CKM, to make a pair
	Bits      uint32 // RSA: of the modulus; 0 otherwise
	// ECParams are values of CKA_EC_PARAMS for the same curve. The process tries them one
	// after the other.
	ECParams []Value
	ID       []byte // empty: the process chooses a free ID
	Label    string
	// If Check is set, the process makes no pair, and needs no login. It only checks
	// whether a visible object has the ID or the label, and whether the token makes such
	// pairs. Then the reply is empty.
	Check bool
}

// Value is the value of an attribute.
type Value struct{ Bytes []byte }

// GenerateReply describes the new pair. The process has read the private key's
// attributes: the key is sensitive and cannot be extracted.
type GenerateReply struct {
	Public, Private Object
	// These are the token's statements about the private key's life so far
	// (CKA_ALWAYS_SENSITIVE, CKA_NEVER_EXTRACTABLE, CKA_LOCAL).
	AlwaysSensitive, NeverExtractable, Local Tri
}

// NewToken asks the module to make a token in a slot whose token is not initialised. The
// process never touches an initialised token. It makes a random PIN for the security
// officer and forgets it.
type NewToken struct {
	Label string // 32 bytes at the most
	// PIN is the user's PIN. The sender sends it straight from its locked memory, and
	// copies it nowhere else.
	PIN *secret.Secret
}

// NewTokenReply names the new token.
type NewTokenReply struct {
	Token TokenID
}

// Cancel says that the agent no longer waits for the request with this number. If the
// request has not reached the module yet, the process drops it and answers with an Error
// of CKRFunctionCanceled. A request in the module goes on.
type Cancel struct {
	Request uint32
}

// Error says that a request failed. Both sides use it as a Go error.
type Error struct {
	Function string // the function that failed: "C_Login"; empty when none was called
	RV       uint64 // its return value (CKR), or 0
	Reason   Reason
	Text     string // for a person; no secret, no handle
	// Info holds the token's state after a failed login, and after a failed search for a
	// key. HasInfo is set if the process could read the state. Without a login, private
	// keys may be invisible.
	HasInfo bool
	Info    TokenInfo
}

// Reason tells why the module process itself refused.
type Reason uint32

// The reasons.
const (
	ReasonModule      Reason = 0 // the module refused: see RV
	ReasonLoad        Reason = 1 // the file cannot be loaded
	ReasonNoToken     Reason = 2 // no such token is present
	ReasonOtherToken  Reason = 3 // another token is in that slot by now
	ReasonNoKey       Reason = 4 // no such private key is visible
	ReasonPINLocked   Reason = 5 // the token's PIN is locked: the process did not try the PIN
	ReasonLastTry     Reason = 6 // one try is left and LastTry was not set: the process did not try the PIN
	ReasonProtocol    Reason = 7 // the request makes no sense
	ReasonAmbiguous   Reason = 8 // two private keys fit
	ReasonUnsupported Reason = 9 // this module process does not do that
	// ReasonOneAtATime: the module answers no other call while a thread waits in
	// C_WaitForSlotEvent. This process is lost. Tell the next process to Poll.
	ReasonOneAtATime Reason = 10
	// ReasonRenew: use a new process in place of C_Finalize and C_Initialize. This
	// process has no request under way, and passes no further request to the module.
	ReasonRenew  Reason = 11
	ReasonExists Reason = 12 // a key or certificate has the ID or label: the process made no pair
	// ReasonExtractable: the token made a key that could leave it, or does not say that
	// the key cannot. Text tells what the process did with the pair.
	ReasonExtractable Reason = 13
	// ReasonPulled: a token was put in or taken out, and the module has answered no call
	// since, although a request waits for it. This process is lost.
	ReasonPulled Reason = 14
	// ReasonCiphertext: the token did not decrypt the data. The process does not tell why: a
	// client that learns that the padding was wrong can decrypt data without the key.
	ReasonCiphertext Reason = 15
)

// lastReason is the last known Reason.
const lastReason = ReasonCiphertext
