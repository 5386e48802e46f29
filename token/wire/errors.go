package wire

import (
	"errors"
	"fmt"
	"slices"
)

// Error tells in plain words what happened. It also names the function and the return
// value, so that a person can look them up.
func (e *Error) Error() string {
	text := e.Text
	if text == "" {
		text = Explain(e.RV)
	}
	if text == "" {
		text = e.Reason.String()
	}
	switch {
	case e.Function == "":
		return text
	case e.RV == CKROK:
		return fmt.Sprintf("%s (%s)", text, e.Function)
	default:
		return fmt.Sprintf("%s (%s: %s)", text, e.Function, RVName(e.RV))
	}
}

// String says in a few words why the module process refused.
func (r Reason) String() string {
	switch r {
	case ReasonModule:
		return "the module refused"
	case ReasonLoad:
		return "the module cannot be loaded"
	case ReasonNoToken:
		return "no such token is present"
	case ReasonOtherToken:
		return "another token is in its place"
	case ReasonNoKey:
		return "no such private key is on the token"
	case ReasonPINLocked:
		return "the PIN is locked"
	case ReasonLastTry:
		return "only one try is left for the PIN"
	case ReasonProtocol:
		return "the request makes no sense"
	case ReasonAmbiguous:
		return "several private keys fit"
	case ReasonUnsupported:
		return "this is not supported"
	case ReasonOneAtATime:
		return "the module does one thing at a time"
	case ReasonRenew:
		return "a new process is wanted"
	case ReasonExists:
		return "a key of that id or label is on the token"
	case ReasonPulled:
		return "the module has not answered since a token was put in or taken out"
	case ReasonCiphertext:
		return "the token does not decrypt this"
	case ReasonExtractable:
		return "the token made a key that could leave it"
	default:
		return fmt.Sprintf("reason %d", uint32(r))
	}
}

// String tells in a few words which parts are in force.
func (s Sandbox) String() string {
	if s.Off {
		return "off (configuration)"
	}
	byLandlock, bySeccomp := "files", "system calls"
	if s.Scoped {
		byLandlock += ", signals and abstract sockets"
	} else {
		bySeccomp += " and signals"
	}
	in := func(what, how, failure string) string {
		if failure != "" {
			return what + ": " + failure
		}
		return what + " (" + how + ")"
	}
	text := in(byLandlock, fmt.Sprintf("landlock %d", s.Files), s.FilesError) + ", " + in(bySeccomp, "seccomp", s.CallsError)
	if len(s.Missing) > 0 {
		text += fmt.Sprintf("; not writable, as it is not there: %q", s.Missing)
	}
	return text
}

// Whole tells whether every part is in force.
func (s Sandbox) Whole() bool { return !s.Off && s.Files > 0 && s.Calls && len(s.Missing) == 0 }

// RVName returns the name of a return value as the standard spells it, such as
// CKR_PIN_INCORRECT. For a value that the standard does not define, it returns a number.
func RVName(rv uint64) string {
	if name, ok := rvNames[rv]; ok {
		return "CKR_" + name
	}
	if rv >= ckrVendorDefined {
		return fmt.Sprintf("CKR_VENDOR_DEFINED|%#x", rv-ckrVendorDefined)
	}
	return fmt.Sprintf("CKR %#x", rv)
}

// Explain tells in plain words what a return value means. It returns "" for values that
// mean nothing to a user.
func Explain(rv uint64) string {
	switch rv {
	case CKRHostMemory, CKRDeviceMemory:
		return "the module or the card has no memory left"
	case CKRGeneralError, CKRFunctionFailed:
		return "the module failed and does not say why"
	case CKRDeviceError:
		return "the card or its reader reports an error"
	case CKRDeviceRemoved, CKRTokenNotPresent, CKRSlotIDInvalid:
		return "the card was removed"
	case CKRTokenNotRecognized:
		return "the module does not know this card"
	case CKRFunctionCanceled, CKRFunctionRejected:
		return "it was cancelled at the card or its reader"
	case CKRFunctionNotSupported:
		return "the module does not support this"
	case CKRKeyFunctionNotPermitted:
		return "the key may not be used for this"
	case CKRKeyTypeInconsistent, CKRMechanismInvalid, CKRMechanismParamInvalid:
		return "the card does not use this key in this way"
	case CKRDataInvalid, CKRDataLenRange:
		return "the card does not take data of this kind or length"
	case CKRPINIncorrect:
		return "the PIN is wrong"
	case CKRPINInvalid:
		return "the PIN has characters that the card does not take"
	case CKRPINLenRange:
		return "the PIN is too short or too long for the card"
	case CKRPINExpired:
		return "the PIN has expired: set a new one with the card's own program"
	case CKRPINLocked:
		return "the PIN is locked: unlock it with its PUK and the card's own program"
	case CKRUserPINNotInitialized:
		return "no PIN was ever set: set one with the card's own program"
	case CKRUserNotLoggedIn:
		return "the card wants its PIN first"
	case CKRUserAnotherAlreadyLoggedIn:
		return "another user is logged in to the card"
	case CKRSessionCount:
		return "the card has no session left: another program may hold them"
	case CKRSessionHandleInvalid, CKRSessionClosed, CKRKeyHandleInvalid, CKRObjectHandleInvalid:
		return "the card was reset or the session with it ended"
	case CKRCryptokiNotInitialized:
		return "the module has shut down"
	default:
		return ""
	}
}

const ckrVendorDefined = 0x80000000

// rvNames holds the return values of PKCS#11 v3.1 (pkcs11t.h), without their prefix.
var rvNames = map[uint64]string{
	0x000: "OK",
	0x001: "CANCEL",
	0x002: "HOST_MEMORY",
	0x003: "SLOT_ID_INVALID",
	0x005: "GENERAL_ERROR",
	0x006: "FUNCTION_FAILED",
	0x007: "ARGUMENTS_BAD",
	0x008: "NO_EVENT",
	0x009: "NEED_TO_CREATE_THREADS",
	0x00a: "CANT_LOCK",
	0x010: "ATTRIBUTE_READ_ONLY",
	0x011: "ATTRIBUTE_SENSITIVE",
	0x012: "ATTRIBUTE_TYPE_INVALID",
	0x013: "ATTRIBUTE_VALUE_INVALID",
	0x01b: "ACTION_PROHIBITED",
	0x020: "DATA_INVALID",
	0x021: "DATA_LEN_RANGE",
	0x030: "DEVICE_ERROR",
	0x031: "DEVICE_MEMORY",
	0x032: "DEVICE_REMOVED",
	0x040: "ENCRYPTED_DATA_INVALID",
	0x041: "ENCRYPTED_DATA_LEN_RANGE",
	0x050: "FUNCTION_CANCELED",
	0x051: "FUNCTION_NOT_PARALLEL",
	0x054: "FUNCTION_NOT_SUPPORTED",
	0x060: "KEY_HANDLE_INVALID",
	0x062: "KEY_SIZE_RANGE",
	0x063: "KEY_TYPE_INCONSISTENT",
	0x064: "KEY_NOT_NEEDED",
	0x065: "KEY_CHANGED",
	0x066: "KEY_NEEDED",
	0x067: "KEY_INDIGESTIBLE",
	0x068: "KEY_FUNCTION_NOT_PERMITTED",
	0x069: "KEY_NOT_WRAPPABLE",
	0x06a: "KEY_UNEXTRACTABLE",
	0x070: "MECHANISM_INVALID",
	0x071: "MECHANISM_PARAM_INVALID",
	0x082: "OBJECT_HANDLE_INVALID",
	0x090: "OPERATION_ACTIVE",
	0x091: "OPERATION_NOT_INITIALIZED",
	0x0a0: "PIN_INCORRECT",
	0x0a1: "PIN_INVALID",
	0x0a2: "PIN_LEN_RANGE",
	0x0a3: "PIN_EXPIRED",
	0x0a4: "PIN_LOCKED",
	0x0b0: "SESSION_CLOSED",
	0x0b1: "SESSION_COUNT",
	0x0b3: "SESSION_HANDLE_INVALID",
	0x0b4: "SESSION_PARALLEL_NOT_SUPPORTED",
	0x0b5: "SESSION_READ_ONLY",
	0x0b6: "SESSION_EXISTS",
	0x0b7: "SESSION_READ_ONLY_EXISTS",
	0x0b8: "SESSION_READ_WRITE_SO_EXISTS",
	0x0c0: "SIGNATURE_INVALID",
	0x0c1: "SIGNATURE_LEN_RANGE",
	0x0d0: "TEMPLATE_INCOMPLETE",
	0x0d1: "TEMPLATE_INCONSISTENT",
	0x0e0: "TOKEN_NOT_PRESENT",
	0x0e1: "TOKEN_NOT_RECOGNIZED",
	0x0e2: "TOKEN_WRITE_PROTECTED",
	0x0f0: "UNWRAPPING_KEY_HANDLE_INVALID",
	0x0f1: "UNWRAPPING_KEY_SIZE_RANGE",
	0x0f2: "UNWRAPPING_KEY_TYPE_INCONSISTENT",
	0x100: "USER_ALREADY_LOGGED_IN",
	0x101: "USER_NOT_LOGGED_IN",
	0x102: "USER_PIN_NOT_INITIALIZED",
	0x103: "USER_TYPE_INVALID",
	0x104: "USER_ANOTHER_ALREADY_LOGGED_IN",
	0x105: "USER_TOO_MANY_TYPES",
	0x110: "WRAPPED_KEY_INVALID",
	0x112: "WRAPPED_KEY_LEN_RANGE",
	0x113: "WRAPPING_KEY_HANDLE_INVALID",
	0x114: "WRAPPING_KEY_SIZE_RANGE",
	0x115: "WRAPPING_KEY_TYPE_INCONSISTENT",
	0x120: "RANDOM_SEED_NOT_SUPPORTED",
	0x121: "RANDOM_NO_RNG",
	0x130: "DOMAIN_PARAMS_INVALID",
	0x140: "CURVE_NOT_SUPPORTED",
	0x150: "BUFFER_TOO_SMALL",
	0x160: "SAVED_STATE_INVALID",
	0x170: "INFORMATION_SENSITIVE",
	0x180: "STATE_UNSAVEABLE",
	0x190: "CRYPTOKI_NOT_INITIALIZED",
	0x191: "CRYPTOKI_ALREADY_INITIALIZED",
	0x1a0: "MUTEX_BAD",
	0x1a1: "MUTEX_NOT_LOCKED",
	0x1b0: "NEW_PIN_MODE",
	0x1b1: "NEXT_OTP",
	0x1b5: "EXCEEDED_MAX_ITERATIONS",
	0x1b6: "FIPS_SELF_TEST_FAILED",
	0x1b7: "LIBRARY_LOAD_FAILED",
	0x1b8: "PIN_TOO_WEAK",
	0x1b9: "PUBLIC_KEY_INVALID",
	0x200: "FUNCTION_REJECTED",
	0x201: "TOKEN_RESOURCE_EXCEEDED",
	0x202: "OPERATION_CANCEL_FAILED",
	0x203: "KEY_EXHAUSTED",
}

// IsRV reports whether err is a failed call of the module with one of the return values
// (CKR).
func IsRV(err error, rvs ...uint64) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Reason == ReasonModule && slices.Contains(rvs, e.RV)
}

// IsReason reports whether err is an Error with one of the reasons.
func IsReason(err error, reasons ...Reason) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && slices.Contains(reasons, e.Reason)
}
