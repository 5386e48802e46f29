package main

import (
	"fmt"
	"os"
)

// attacks maps the first argument of the program "attacker" to an attack. The scripts in
// testdata/attack run this program. An attack gets the other arguments.
var attacks = map[string]func(args []string) error{
	"sign":  attackSign,
	"flood": attackFlood,
	"log":   attackLog,
}

// attacker is a hostile program with a socket of the agent. It exits with 0 if it could carry
// out the attack, also if the attack had no success.
func attacker() {
	if len(os.Args) < 2 || attacks[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "attacker: unknown attack")
		os.Exit(2)
	}
	if err := attacks[os.Args[1]](os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "attacker:", err)
		os.Exit(1)
	}
}
