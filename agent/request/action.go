package request

// An Action is a kind of request that uses or changes keys.
type Action string

// The actions.
const (
	ActionSign      Action = "sign"
	ActionAdd       Action = "add"
	ActionRemove    Action = "remove"
	ActionRemoveAll Action = "remove-all"
	ActionLock      Action = "lock"
	ActionUnlock    Action = "unlock"
	ActionLogin     Action = "login"
	ActionLogout    Action = "logout"
	// ActionStatus is logged only if it is refused.
	ActionStatus Action = "status"
)

// Done is the message of the log for a granted request.
func (r Action) Done() string {
	switch r {
	case ActionSign:
		return "signed"
	case ActionAdd:
		return "key added"
	case ActionRemove:
		return "key removed"
	case ActionRemoveAll:
		return "all keys removed"
	case ActionLock:
		return "agent locked"
	case ActionUnlock:
		return "agent unlocked"
	case ActionLogin:
		return "logged in"
	case ActionLogout:
		return "logged out"
	}
	return string(r)
}
