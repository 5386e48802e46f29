package wire

// Both sides need these numbers of PKCS#11 v2.40 and v3.0 (pkcs11t.h). They do not come
// from a PKCS#11 library, because only the module process may link such a library.

// Object classes (CKO).
const (
	CKOCertificate = 1
	CKOPublicKey   = 2
	CKOPrivateKey  = 3
)

// Key types (CKK).
const (
	CKKRSA       = 0x00
	CKKEC        = 0x03
	CKKECEdwards = 0x40
)

// Mechanisms (CKM).
const (
	CKMRSAPKCSKeyPairGen   = 0x0000
	CKMRSAPKCS             = 0x0001
	CKMSHA1RSAPKCS         = 0x0006
	CKMRSAPKCSOAEP         = 0x0009
	CKMRSAPKCSPSS          = 0x000d
	CKMSHA1RSAPSS          = 0x000e
	CKMSHA256RSAPKCS       = 0x0040
	CKMSHA384RSAPKCS       = 0x0041
	CKMSHA512RSAPKCS       = 0x0042
	CKMSHA256RSAPSS        = 0x0043
	CKMSHA384RSAPSS        = 0x0044
	CKMSHA512RSAPSS        = 0x0045
	CKMSHA224RSAPKCS       = 0x0046
	CKMSHA224RSAPSS        = 0x0047
	CKMSHA1                = 0x0220
	CKMSHA256              = 0x0250
	CKMSHA224              = 0x0255
	CKMSHA384              = 0x0260
	CKMSHA512              = 0x0270
	CKMECKeyPairGen        = 0x1040
	CKMECDSA               = 0x1041
	CKMECDSASHA1           = 0x1042
	CKMECDSASHA224         = 0x1043
	CKMECDSASHA256         = 0x1044
	CKMECDSASHA384         = 0x1045
	CKMECDSASHA512         = 0x1046
	CKMECDH1Derive         = 0x1050
	CKMECEdwardsKeyPairGen = 0x1055
	CKMEdDSA               = 0x1057
)

// Mask generation functions (CKG).
const (
	CKGMGF1SHA1   = 1
	CKGMGF1SHA256 = 2
	CKGMGF1SHA384 = 3
	CKGMGF1SHA512 = 4
	CKGMGF1SHA224 = 5
)

// Key derivation functions (CKD).
const CKDNull = 1

// Mechanism flags (CKF).
const (
	CKFDecrypt = 0x00000200
	CKFSign    = 0x00000800
	CKFDerive  = 0x00080000
)

// Slot flags (CKF).
const (
	CKFTokenPresent    = 0x1
	CKFRemovableDevice = 0x2
)

// Token flags (CKF).
const (
	CKFWriteProtected              = 0x00000002
	CKFLoginRequired               = 0x00000004
	CKFUserPINInitialized          = 0x00000008
	CKFProtectedAuthenticationPath = 0x00000100
	CKFTokenInitialized            = 0x00000400
	CKFUserPINCountLow             = 0x00010000
	CKFUserPINFinalTry             = 0x00020000
	CKFUserPINLocked               = 0x00040000
	CKFUserPINToBeChanged          = 0x00080000
)

// Return values (CKR).
const (
	CKROK                         = 0x000
	CKRHostMemory                 = 0x002
	CKRSlotIDInvalid              = 0x003
	CKRGeneralError               = 0x005
	CKRFunctionFailed             = 0x006
	CKRArgumentsBad               = 0x007
	CKRNoEvent                    = 0x008
	CKRAttributeReadOnly          = 0x010
	CKRAttributeTypeInvalid       = 0x012
	CKRAttributeValueInvalid      = 0x013
	CKRDataInvalid                = 0x020
	CKRDataLenRange               = 0x021
	CKRDeviceError                = 0x030
	CKRDeviceMemory               = 0x031
	CKRDeviceRemoved              = 0x032
	CKREncryptedDataInvalid       = 0x040
	CKREncryptedDataLenRange      = 0x041
	CKRFunctionCanceled           = 0x050
	CKRFunctionNotSupported       = 0x054
	CKRKeyHandleInvalid           = 0x060
	CKRKeyTypeInconsistent        = 0x063
	CKRKeyFunctionNotPermitted    = 0x068
	CKRMechanismInvalid           = 0x070
	CKRMechanismParamInvalid      = 0x071
	CKRObjectHandleInvalid        = 0x082
	CKROperationActive            = 0x090
	CKROperationNotInitialized    = 0x091
	CKRKeySizeRange               = 0x062
	CKRPINIncorrect               = 0x0a0
	CKRPINInvalid                 = 0x0a1
	CKRPINLenRange                = 0x0a2
	CKRPINExpired                 = 0x0a3
	CKRPINLocked                  = 0x0a4
	CKRSessionClosed              = 0x0b0
	CKRSessionCount               = 0x0b1
	CKRSessionHandleInvalid       = 0x0b3
	CKRTemplateIncomplete         = 0x0d0
	CKRTemplateInconsistent       = 0x0d1
	CKRTokenNotPresent            = 0x0e0
	CKRTokenNotRecognized         = 0x0e1
	CKRUserAlreadyLoggedIn        = 0x100
	CKRUserNotLoggedIn            = 0x101
	CKRUserPINNotInitialized      = 0x102
	CKRUserAnotherAlreadyLoggedIn = 0x104
	CKRDomainParamsInvalid        = 0x130
	CKRCurveNotSupported          = 0x140
	CKRBufferTooSmall             = 0x150
	CKRCryptokiNotInitialized     = 0x190
	CKRFunctionRejected           = 0x200
)
