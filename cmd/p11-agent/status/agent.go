package status

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"p11-agent/agent/sshagent"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/pinentry/plain"
	"p11-agent/token/module/undumpable"
)

// socketVariable is the environment variable that ssh looks at.
const socketVariable = "SSH_AUTH_SOCK"

// timeout is how long an agent may take for its report. The agent waits for nothing
// meanwhile.
const timeout = 10 * time.Second

// An Agent is a connection to a running agent that has sent its report.
type Agent struct {
	*sshagent.Control
	Path   string
	Note   string // tells a person that ssh asks another agent; may be empty
	JSON   []byte // the report as the agent sent it
	Report Report
}

// A NotFoundError says that no agent answers.
type NotFoundError struct{ tried []string }

func (e *NotFoundError) Error() string {
	return "no p11-agent answers: " + strings.Join(e.tried, "; ")
}

// Hint returns the next step.
func (*NotFoundError) Hint() string {
	return `"p11-agent doctor" finds out why; eval "$(p11-agent agent -s)" starts one for this shell`
}

// Find connects to the agent at path, and asks for its status, about the tokens that the
// URI selects. Without a path it tries the agent of SSH_AUTH_SOCK, and then the agent at
// the usual place of this user. The error is a *NotFoundError when no agent answers.
func Find(ctx context.Context, path, uri string) (*Agent, error) {
	if path != "" {
		path, err := filepath.Abs(path)
		if err != nil {
			return nil, err
		}
		a, err := Query(ctx, path, uri)
		if err != nil {
			return nil, notFound(path+": ", err)
		}
		return a, nil
	}
	var tried []string
	var failed error // of an agent that does answer
	own := ""
	if path := paths.RuntimeSocket(paths.AgentName); path != "" {
		own = path
	} else if path := paths.StateSocket(); path != "" {
		if _, err := os.Lstat(path); err == nil {
			own = path
		}
	}
	named := os.Getenv(socketVariable)
	if named == "" {
		tried = append(tried, socketVariable+" is not set")
	} else {
		a, err := Query(ctx, named, uri)
		if err == nil {
			return a, nil
		}
		if !IsNotFound(err) {
			failed = err
		}
		tried = append(tried, fmt.Sprintf("%s is %s: %v", socketVariable, plain.Line(named), err))
	}
	switch {
	case own == "":
		tried = append(tried, "XDG_RUNTIME_DIR is not set")
	case own == named:
	default:
		a, err := Query(ctx, own, uri)
		if err == nil {
			a.Note = fmt.Sprintf("note: this is the agent at %s, and %s; ssh asks the one of %s", own, tried[0], socketVariable)
			return a, nil
		}
		if failed == nil && !IsNotFound(err) {
			failed = err
		}
		tried = append(tried, fmt.Sprintf("%s: %v", own, err))
	}
	if failed != nil {
		return nil, failed
	}
	return nil, &NotFoundError{tried}
}

// notFound returns a *NotFoundError for an error that means that no agent answers.
func notFound(where string, err error) error {
	if IsNotFound(err) {
		return &NotFoundError{[]string{where + err.Error()}}
	}
	return err
}

// IsNotFound tells whether an error of Query means that no p11-agent has answered.
func IsNotFound(err error) bool {
	_, answered := errors.AsType[sshagent.ControlError](err)
	return !answered
}

// Query connects to the agent at a path, and asks for its status, about the tokens that the
// URI selects. It makes this process dumpable while it asks, so it must hold no secret.
func Query(ctx context.Context, path, uri string) (*Agent, error) {
	// The agent looks which program its client is, and cannot do that otherwise.
	if err := undumpable.Suspend(); err != nil {
		return nil, err
	}
	a, err := ask(ctx, path, uri)
	if closed := undumpable.Enforce(); closed != nil {
		if err == nil {
			_ = a.Close()
		}
		return nil, closed
	}
	return a, err
}

// ask does what Query does, in a process that the agent can look at.
func ask(ctx context.Context, path, uri string) (*Agent, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the agent does not answer within %v", timeout))
	defer cancel()
	c, err := sshagent.DialControl(ctx, path)
	if err != nil {
		return nil, err
	}
	a := &Agent{Control: c, Path: path}
	if a.JSON, err = c.Status(ctx, uri); err == nil {
		if err = json.Unmarshal(a.JSON, &a.Report); err != nil {
			err = fmt.Errorf("read the report of the agent: %w", err)
		}
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return a, nil
}
