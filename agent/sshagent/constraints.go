package sshagent

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/ssh"

	"p11-agent/agent/request"
	"p11-agent/pinentry/plain"
)

// Constraint types (RFC 9987 section 5.2.7 and 8.2). OpenSSH used type 3, the number of
// signatures, for XMSS keys only.
const (
	constrainLifetime  = 1
	constrainConfirm   = 2
	constrainExtension = 255
)

// The constraint extensions, both of OpenSSH's PROTOCOL.agent.
const (
	constrainDestination = "restrict-destination-v00@openssh.com" // section 2
	constrainCerts       = "associated-certs-v00@openssh.com"     // section 3
)

const (
	maxDestinations = 1024 // as ssh-agent
	maxCerts        = 1024 // as ssh-agent
	maxHostKeys     = 1024 // of one end of a destination
	maxUser         = 256  // bytes of a user name, as ssh-agent
)

// parseConstraints reads constraints until the end of the message. An unknown or incomplete
// constraint is an error: without it, the key would be less limited than the client wants. A client
// may give each constraint once, and certificates only with the keys of tokens.
func parseConstraints(in *reader, token bool) (request.Constraints, error) {
	var c request.Constraints
	for len(in.rest) > 0 {
		switch kind := in.byte(); kind {
		case constrainLifetime:
			if c.Lifetime != 0 {
				return request.Constraints{}, twice("lifetime")
			}
			// Without a lifetime, Lifetime is 0 as well.
			c.Lifetime = max(request.NoTime, time.Duration(in.uint32())*time.Second)
		case constrainConfirm:
			if c.Confirm {
				return request.Constraints{}, twice("confirm")
			}
			c.Confirm = true
		case constrainExtension:
			if err := parseExtension(&c, in, token); err != nil {
				return request.Constraints{}, err
			}
		default:
			return request.Constraints{}, fmt.Errorf("constraint %d is not supported", kind)
		}
	}
	return c, in.end()
}

func parseExtension(c *request.Constraints, in *reader, token bool) (err error) {
	// The data of a constraint has no length. So the next constraint cannot be found
	// after an unknown name.
	switch name := in.bytes(); string(name) {
	case constrainDestination:
		if c.Destinations != nil {
			return twice(constrainDestination)
		}
		c.Destinations, err = parseDestinations(reader{rest: in.bytes(), failed: in.failed})
	case constrainCerts:
		if !token {
			return errors.New("certificates can only be added to the keys of a token")
		}
		if c.Certificates != nil {
			return twice(constrainCerts)
		}
		c.CertificatesOnly = in.bool()
		c.Certificates, err = parseCerts(reader{rest: in.bytes(), failed: in.failed})
	default:
		return fmt.Errorf("constraint extension %s is not supported", plain.Quoted(name, maxQuoted))
	}
	return err
}

func twice(name string) error { return fmt.Errorf("constraint %s is given twice", name) }

// parseDestinations reads a list of destinations. As with ssh-agent, an empty list limits nothing.
func parseDestinations(in reader) ([]request.Destination, error) {
	var list []request.Destination
	for len(in.rest) > 0 {
		if len(list) == maxDestinations {
			return nil, fmt.Errorf("more than %d destinations", maxDestinations)
		}
		d, err := parseDestination(reader{rest: in.bytes(), failed: in.failed})
		if err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	return list, in.end()
}

func parseDestination(in reader) (d request.Destination, err error) {
	from, to, reserved := in.bytes(), in.bytes(), in.bytes()
	if err := in.end(); err != nil {
		return d, err
	}
	if len(reserved) > 0 {
		return d, errReserved
	}
	if d.From, err = parseHop(reader{rest: from}); err != nil {
		return d, err
	}
	if d.To, err = parseHop(reader{rest: to}); err != nil {
		return d, err
	}
	switch {
	case d.From.User != "":
		return d, errors.New("a destination names the user it starts from")
	case (d.From.Host == "") != (len(d.From.Keys) == 0):
		return d, errors.New("a destination starts from a host without keys, or from keys without a host")
	case d.To.Host == "" || len(d.To.Keys) == 0:
		return d, errors.New("a destination does not say which host it leads to")
	}
	return d, nil
}

var errReserved = errors.New("a destination uses fields that are reserved")

func parseHop(in reader) (request.Hop, error) {
	user, host, reserved := in.bytes(), in.bytes(), in.bytes()
	switch {
	case in.failed:
		return request.Hop{}, errMalformed
	case len(reserved) > 0:
		return request.Hop{}, errReserved
	case len(user) > maxUser:
		return request.Hop{}, fmt.Errorf("a destination's user name is longer than %d bytes", maxUser)
	case bytes.IndexByte(user, 0) >= 0 || bytes.IndexByte(host, 0) >= 0:
		return request.Hop{}, errNUL
	}
	h := request.Hop{User: string(user), Host: string(host)}
	for len(in.rest) > 0 {
		if len(h.Keys) == maxHostKeys {
			return request.Hop{}, fmt.Errorf("a destination has more than %d host keys", maxHostKeys)
		}
		blob, ca := in.bytes(), in.bool()
		if in.failed {
			return request.Hop{}, errMalformed
		}
		key, err := parseAnyKey(blob, maxHostKey)
		if err != nil {
			return request.Hop{}, fmt.Errorf("a destination's host keys: %w", err)
		}
		h.Keys = append(h.Keys, request.HostKey{Key: key, CA: ca})
	}
	return h, nil
}

// parseCerts reads a list of certificates. It skips plain keys, and certificates and keys of an
// unknown type, as ssh-agent of OpenSSH 10.5 does: a person may name all public keys there are.
func parseCerts(in reader) ([]*ssh.Certificate, error) {
	var certs []*ssh.Certificate
	for n := 0; len(in.rest) > 0; n++ {
		if n == maxCerts {
			return nil, fmt.Errorf("more than %d certificates", maxCerts)
		}
		blob := in.bytes()
		if in.failed {
			return nil, errMalformed
		}
		key, err := parseAnyKey(blob, maxCertificate)
		if err != nil {
			return nil, fmt.Errorf("certificates: %w", err)
		}
		if cert, ok := key.(*ssh.Certificate); ok {
			certs = append(certs, cert)
		}
	}
	return certs, in.end()
}
