package agent

// A Request is what a client asks for, as far as it uses or changes keys.
type Request string

// The requests.
const (
	RequestSign      Request = "sign"
	RequestAdd       Request = "add"
	RequestRemove    Request = "remove"
	RequestRemoveAll Request = "remove-all"
	RequestLock      Request = "lock"
	RequestUnlock    Request = "unlock"
	RequestLogin     Request = "login"
	RequestLogout    Request = "logout"
	// RequestStatus is noted when it is refused only.
	RequestStatus Request = "status"
)

// done is what the log says of a request that was granted.
func (r Request) done() string {
	switch r {
	case RequestSign:
		return "signed"
	case RequestAdd:
		return "key added"
	case RequestRemove:
		return "key removed"
	case RequestRemoveAll:
		return "all keys removed"
	case RequestLock:
		return "agent locked"
	case RequestUnlock:
		return "agent unlocked"
	case RequestLogin:
		return "logged in"
	case RequestLogout:
		return "logged out"
	}
	return string(r)
}
