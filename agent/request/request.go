// Package request is the vocabulary of a request: the Caller that makes it, the Use of a
// key that it asks for, and what is known of the data, the host and the purpose. Each
// door to the agent speaks it, and so do the keyring, approval and audit.
//
// The package promises that these values do not change once a request has begun. It
// decides nothing: the keyring and package approval do.
package request
