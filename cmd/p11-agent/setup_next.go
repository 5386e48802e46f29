package main

import (
	"slices"

	"p11-agent/token"
	"p11-agent/token/wellknown"
)

// firstSteps are what a person without a key does next. list, doctor
// and setup say the same.
func firstSteps(modules []token.ModuleStatus) []string {
	plug := "plug in a smart card or a security key"
	if !slices.ContainsFunc(modules, func(m token.ModuleStatus) bool { return wellknown.KindOf(m.Path).SmartCards() }) {
		plug += ", for which a module is needed: " + installStep("opensc-pkcs11", "opensc")
	}
	return []string{plug, setupStep}
}

// setupStep leads a newcomer.
const setupStep = "p11-agent setup  # makes a token and a key where there are none, and leads to the first login"
