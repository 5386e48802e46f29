package request

// SignatureFlags are the flags of a sign request (RFC 9987 section 5.6.1).
type SignatureFlags uint32

// The flags. Others are refused.
const (
	SignatureRSASHA2256 SignatureFlags = 2
	SignatureRSASHA2512 SignatureFlags = 4
)

// A Sign asks for a signature of Data with the key whose wire form is
// Key. All of it is the door's memory: not to be kept once the request is
// answered.
type Sign struct {
	Key   []byte
	Data  []byte
	Flags SignatureFlags
	// Content is what Data says of itself.
	Content Content
	// Login is what Data says when it is a request to be let in with this key
	// (KindLogin).
	Login *Login
}

// A Login is a request to be let in at a server with a public key (RFC 4252
// section 7, or publickey-hostbound-v00@openssh.com, OpenSSH's PROTOCOL section
// 3.1).
type Login struct {
	User      string
	SessionID []byte
	HostKey   []byte // wire form of the server's key; nil when the method has none
}
