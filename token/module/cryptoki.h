/*
 * The part of a PKCS#11 function list that library.go calls by itself, laid out
 * as CK_FUNCTION_LIST of PKCS#11 v2.40 (pkcs11t.h, pkcs11f.h) is on Unix.
 */

typedef unsigned char CK_BYTE;
typedef unsigned long CK_ULONG;
typedef CK_ULONG CK_RV;

enum {
	CKR_GENERAL_ERROR = 0x05,
	CKR_FUNCTION_NOT_SUPPORTED = 0x54,
	CKF_DONT_BLOCK = 1,

	CKO_SECRET_KEY = 4,
	CKK_GENERIC_SECRET = 0x10,
	CKD_NULL = 1,
	CKZ_DATA_SPECIFIED = 1,

	CKA_CLASS = 0x00,
	CKA_TOKEN = 0x01,
	CKA_PRIVATE = 0x02,
	CKA_VALUE = 0x11,
	CKA_KEY_TYPE = 0x100,
	CKA_SENSITIVE = 0x103,
	CKA_VALUE_LEN = 0x161,
	CKA_EXTRACTABLE = 0x162,
};

struct attribute { /* CK_ATTRIBUTE */
	CK_ULONG type;
	void *value;
	CK_ULONG length;
};

struct mechanism { /* CK_MECHANISM */
	CK_ULONG type;
	void *parameter;
	CK_ULONG length;
};

struct pss_params { /* CK_RSA_PKCS_PSS_PARAMS */
	CK_ULONG hash, mgf, salt;
};

struct oaep_params { /* CK_RSA_PKCS_OAEP_PARAMS */
	CK_ULONG hash, mgf, source;
	void *source_data;
	CK_ULONG source_length;
};

struct ecdh1_params { /* CK_ECDH1_DERIVE_PARAMS */
	CK_ULONG kdf;
	CK_ULONG shared_length;
	void *shared;
	CK_ULONG public_length;
	void *public;
};

struct functions { /* CK_FUNCTION_LIST */
	CK_BYTE major, minor;
	void *initialize, *finalize, *get_info, *get_function_list;
	CK_RV (*get_slot_list)(CK_BYTE present, CK_ULONG *list, CK_ULONG *count);
	void *get_slot_info, *get_token_info;
	CK_RV (*get_mechanism_list)(CK_ULONG slot, CK_ULONG *list, CK_ULONG *count);
	void *get_mechanism_info;
	CK_RV (*init_token)(CK_ULONG slot, CK_BYTE *pin, CK_ULONG length, CK_BYTE *label);
	CK_RV (*init_pin)(CK_ULONG session, CK_BYTE *pin, CK_ULONG length);
	void *set_pin;
	void *open_session, *close_session, *close_all_sessions, *get_session_info;
	void *get_operation_state, *set_operation_state;
	CK_RV (*login)(CK_ULONG session, CK_ULONG user, CK_BYTE *pin, CK_ULONG length);
	void *logout;
	void *create_object, *copy_object;
	CK_RV (*destroy_object)(CK_ULONG session, CK_ULONG object);
	void *get_object_size;
	CK_RV (*get_attribute_value)(CK_ULONG session, CK_ULONG object, struct attribute *list, CK_ULONG count);
	void *set_attribute_value, *find_objects_init;
	CK_RV (*find_objects)(CK_ULONG session, CK_ULONG *list, CK_ULONG room, CK_ULONG *count);
	void *find_objects_final;
	void *encrypt_init, *encrypt, *encrypt_update, *encrypt_final;
	CK_RV (*decrypt_init)(CK_ULONG session, struct mechanism *mechanism, CK_ULONG key);
	CK_RV (*decrypt)(CK_ULONG session, CK_BYTE *data, CK_ULONG length, CK_BYTE *plaintext, CK_ULONG *room);
	void *decrypt_update, *decrypt_final;
	void *digest_init, *digest, *digest_update, *digest_key, *digest_final;
	CK_RV (*sign_init)(CK_ULONG session, struct mechanism *mechanism, CK_ULONG key);
	CK_RV (*sign)(CK_ULONG session, CK_BYTE *data, CK_ULONG length, CK_BYTE *signature, CK_ULONG *room);
	void *sign_update, *sign_final, *sign_recover_init, *sign_recover;
	void *verify_init, *verify, *verify_update, *verify_final, *verify_recover_init, *verify_recover;
	void *digest_encrypt_update, *decrypt_digest_update, *sign_encrypt_update, *decrypt_verify_update;
	void *generate_key, *generate_key_pair, *wrap_key, *unwrap_key;
	CK_RV (*derive_key)(CK_ULONG session, struct mechanism *mechanism, CK_ULONG key,
		struct attribute *list, CK_ULONG count, CK_ULONG *object);
	void *seed_random, *generate_random, *get_function_status, *cancel_function;
	/* The last of v2.40, and not in v2.0. */
	CK_RV (*wait_for_slot_event)(CK_ULONG flags, CK_ULONG *slot, void *reserved);
};
