package main

import (
	"p11-agent/token"
	"p11-agent/token/wellknown"
)

// trouble says why a module does not work, in its own words where it has any, and what
// helps: what doctor says of it. A module that works has none.
func trouble(m token.ModuleStatus) (reason string, next []string) {
	switch {
	case m.Err == nil:
		return "", nil
	case wellknown.KindOf(m.Path) == wellknown.TPM2 && noTPM():
		// It comes with a package that many have for another reason.
		return "there is no TPM on this machine", nil
	}
	f := new(finding)
	adviseModule(f, m)
	return m.Err.Error(), f.next
}

// adviseFailure returns what helps against an error of a module.
func adviseFailure(e *token.ModuleError) []string {
	_, next := trouble(token.ModuleStatus{Name: e.Module, Path: e.Path, Err: e.Err})
	return next
}
