package peer

import (
	"errors"
	"fmt"
	"os"
)

// namespaces are the kinds of namespaces(7) in which names mean something else:
// users, files, processes, and the sockets of displays and buses. kind is what a
// person calls each.
var namespaces = []struct{ file, kind string }{
	{"user", "user"}, {"mnt", "mount"}, {"pid", "PID"}, {"net", "network"},
}

// Apart says why the process may live in other namespaces(7) than this one, as in a
// sandbox or a container, or has ended. nil: it lives in the same ones. It makes some 15
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

// sameNamespaces says why the process is in other namespaces than this one. Such a
// process is in a sandbox or a container: what it calls a display or a terminal is
// of its own making. A process whose namespaces cannot be read counts as such.
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

// unpathed leaves out the path of an error, which tells a person nothing.
func unpathed(err error) error {
	if e, ok := errors.AsType[*os.PathError](err); ok {
		return e.Err
	}
	return err
}
