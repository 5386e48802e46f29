package peer

import (
	"errors"
	"fmt"
	"os"
)

// namespaces are the kinds of namespaces(7) in which names have another meaning: names of
// users, files, processes, and of the sockets of displays and buses. kind is the kind for a
// person.
var namespaces = []struct{ file, kind string }{
	{"user", "user"}, {"mnt", "mount"}, {"pid", "PID"}, {"net", "network"},
}

// Apart returns nil if the process lives in the same namespaces(7) as this one. The error says that
// the process may live in others, as in a sandbox or a container, or has ended. Apart makes some 15
// short system calls.
func (p Peer) Apart() error {
	pr, err := p.open()
	if err != nil {
		return err
	}
	defer pr.close()
	if err := pr.sameNamespaces(); err != nil {
		return err
	}
	return pr.same()
}

// sameNamespaces returns an error if the process is in other namespaces than this one. Such a
// process is in a sandbox or a container, and chooses its displays and terminals by itself. A
// process whose namespaces cannot be read counts as such.
func (r *running) sameNamespaces() error {
	for _, ns := range namespaces {
		ours, err := os.Readlink("/proc/self/ns/" + ns.file)
		if errors.Is(err, os.ErrNotExist) {
			continue // the kernel has none of this kind
		}
		if err != nil {
			return fmt.Errorf("the agent's %s namespace cannot be read: %w", ns.kind, unpathed(err))
		}
		theirs, err := os.Readlink(procFile(r.pid, "ns/"+ns.file))
		switch {
		case err != nil:
			return fmt.Errorf("the %s namespace of %s cannot be read: %w", ns.kind, r.who, unpathed(err))
		case theirs != ours:
			return fmt.Errorf("%s is in another %s namespace than the agent, as in a sandbox or a container", r.who, ns.kind)
		}
	}
	return nil
}

// unpathed leaves the path out of an error, as it tells a person nothing.
func unpathed(err error) error {
	if e, ok := errors.AsType[*os.PathError](err); ok {
		return e.Err
	}
	return err
}
