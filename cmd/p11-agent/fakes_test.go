package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"p11-agent/cmd/p11-agent/daemon"
)

// The fake pinentry and the fake askpass give the answers that are in the file
// "answers" of a directory, one line for each question:
//
//	pin TEXT      this PIN
//	always TEXT   this PIN, and for every question that follows
//	last TEXT     this PIN, and then the program fails
//	later TEXT    this PIN, once there is a file "release" in the directory
//	stay          nothing, until the agent withdraws the question
//	for W TEXT    this PIN, for every question with the word W in its description, on any line
//	ok            yes
//	ok-later      yes, once there is a file "release" in the directory
//	other         the third button
//	cancel        the Cancel button
//
// If the file has no more lines, the answer is cancel. The fakes write other files of the
// directory: "log" gets the text that they receive, "asked" gets a line for each question, and
// "env" gets the environment of the last start. The directory is "pinentry" or "askpass" in HOME.
// The fakes share only HOME with the agent. The file "flavour" has the flavour that the fake
// pinentry reports. The file "refused" has the commands that it does not know.
type fake struct {
	dir   string
	in    *bufio.Reader
	about string // the description
}

func newFake(name string) *fake {
	return &fake{dir: filepath.Join(os.Getenv("HOME"), name), in: bufio.NewReader(os.Stdin)}
}

// leave ends the process at once: os.Exit takes a second under the race detector.
func leave(status int) {
	_, _, _ = syscall.RawSyscall(syscall.SYS_EXIT_GROUP, uintptr(status), 0, 0)
}

// die ends a fake that fails, so that the story fails.
func die(err error) {
	fmt.Fprintln(os.Stderr, "fake:", err)
	leave(3)
}

func (f *fake) add(file, line string) {
	w, err := os.OpenFile(filepath.Join(f.dir, file), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		die(err)
	}
	_, err = io.WriteString(w, line+"\n")
	if err := errors.Join(err, w.Close()); err != nil {
		die(err)
	}
}

// answer returns the kind and the text of the next answer. It counts the questions under a lock,
// because several processes may ask at the same time.
func (f *fake) answer(question string) (kind, text string) {
	asked, err := os.OpenFile(filepath.Join(f.dir, "asked"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		die(err)
	}
	defer asked.Close()
	if err := syscall.Flock(int(asked.Fd()), syscall.LOCK_EX); err != nil {
		die(err)
	}
	before, err := io.ReadAll(asked)
	if err != nil {
		die(err)
	}
	if _, err := io.WriteString(asked, question+"\n"); err != nil {
		die(err)
	}
	script, err := os.ReadFile(filepath.Join(f.dir, "answers"))
	if err != nil {
		die(err)
	}
	n := strings.Count(string(before), "\n")
	lines := strings.Split(strings.TrimSpace(string(script)), "\n")
	for _, line := range lines {
		kind, text, _ = strings.Cut(line, " ")
		if word, pin, _ := strings.Cut(text, " "); kind == "for" && strings.Contains(f.about, word) {
			return "pin", pin
		}
	}
	for i, line := range lines {
		kind, text, _ = strings.Cut(line, " ")
		if i == n || kind == "always" {
			return kind, text
		}
	}
	return "cancel", ""
}

// wait returns when the file "release" exists. If the parent ends first, the program exits.
func (f *fake) wait() {
	for parent := os.Getppid(); os.Getppid() == parent; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(f.dir, "release")); err == nil {
			return
		}
	}
	leave(0)
}

// keepEnvironment writes the environment of the program to the file "env".
func (f *fake) keepEnvironment() {
	text := strings.Join(os.Environ(), "\n") + "\n"
	if err := os.WriteFile(filepath.Join(f.dir, "env"), []byte(text), 0o600); err != nil {
		die(err)
	}
}

// fakePinentry speaks the side of pinentry in the Assuan protocol.
func fakePinentry() {
	f := newFake("pinentry")
	f.keepEnvironment()
	if _, err := os.Stat(filepath.Join(f.dir, "dead")); err == nil {
		fmt.Fprintln(os.Stderr, "the display is gone")
		leave(1)
	}
	refused, _ := os.ReadFile(filepath.Join(f.dir, "refused"))
	fmt.Println("OK Pleased to meet you")
	for {
		line, err := f.in.ReadString('\n')
		if err != nil {
			leave(0)
		}
		line = strings.TrimSuffix(line, "\n")
		f.add("log", line)
		word, _, _ := strings.Cut(line, " ")
		if slices.Contains(strings.Fields(string(refused)), word) {
			fmt.Println("ERR 536871187 Unknown IPC command <User defined source 1>")
			continue
		}
		switch word {
		case "SETDESC":
			f.about = line
			fmt.Println("OK")
		case "GETPIN", "CONFIRM", "MESSAGE":
			switch kind, text := f.answer(word); kind {
			case "pin", "always":
				fmt.Printf("D %s\nOK\n", text)
			case "last":
				fmt.Printf("D %s\nOK\n", text)
				f.add("dead", "")
				leave(0)
			case "later":
				f.wait()
				fmt.Printf("D %s\nOK\n", text)
			case "stay":
				_, _ = io.Copy(io.Discard, f.in) // until the agent hangs up
				leave(0)
			case "ok":
				fmt.Println("OK")
			case "ok-later":
				f.wait()
				fmt.Println("OK")
			case "other":
				fmt.Println("ERR 83886194 Not confirmed <Pinentry>")
			case "cancel":
				fmt.Println("ERR 83886179 Operation cancelled <Pinentry>")
			default:
				die(fmt.Errorf("no such answer: %s", kind))
			}
		case "GETINFO":
			if b, err := os.ReadFile(filepath.Join(f.dir, "flavour")); err == nil {
				fmt.Printf("D %s\n", strings.TrimSpace(string(b)))
			}
			fmt.Println("OK")
		case "BYE":
			fmt.Println("OK closing connection")
			leave(0)
		default:
			fmt.Println("OK")
		}
	}
}

// fakeAskpass is an askpass program that the agent or ssh-add runs.
func fakeAskpass() {
	f := newFake("askpass")
	f.keepEnvironment()
	text, err := json.Marshal(os.Args[1:])
	if err != nil {
		die(err)
	}
	f.add("log", os.Getenv("SSH_ASKPASS_PROMPT")+string(text))
	switch kind, text := f.answer("ASK"); kind {
	case "pin", "always":
		fmt.Println(text)
	case "ok":
	case "cancel":
		leave(1)
	default:
		die(fmt.Errorf("no such answer: %s", kind))
	}
	leave(0)
}

// fakePanic is an agent that panics.
func fakePanic() {
	if err := daemon.WithoutTraces(); err != nil {
		panic(err)
	}
	panic("oh")
}
