// Package paths says where the files and sockets of p11-agent are. Most functions only
// read the environment. PrivateSocket and AgentSocket make a directory. The paths of the
// configuration file's values are the business of package config.
package paths

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// What an agent for the system uses by default.
const (
	SystemConfig = "/etc/p11-agent/config.toml"
	SystemSocket = "/run/p11-agent/agent.sock"
	SystemState  = "/var/lib/p11-agent"
)

// The names of the logs of an agent in the background. What the agent granted is in both
// logs: other lines cannot push it out of the second one.
const (
	AgentLog   = "agent.log"
	GrantedLog = "granted.log"
)

// The variables of the environment that name a running agent (ssh-agent(1)).
const (
	SocketVariable = "SSH_AUTH_SOCK"
	PIDVariable    = "SSH_AGENT_PID"
)

// directory is the name of p11-agent's own directory in those of the user.
const directory = "p11-agent"

// ConfigFile returns the path of the user's configuration file, or "" when there is no
// home directory.
func ConfigFile() string {
	if dir := os.Getenv("XDG_CONFIG_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, directory, "config.toml")
	}
	if home := os.Getenv("HOME"); filepath.IsAbs(home) {
		return filepath.Join(home, ".config", directory, "config.toml")
	}
	return ""
}

// ConfigHome returns the directory that has the configuration of all programs of the user, or
// "" when there is no home directory.
func ConfigHome() string {
	if file := ConfigFile(); file != "" {
		return filepath.Dir(filepath.Dir(file))
	}
	return ""
}

// StateDir returns the directory where the agent keeps what it remembers over restarts, or
// "" when there is no home directory.
func StateDir() string {
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, directory)
	}
	if home := os.Getenv("HOME"); filepath.IsAbs(home) {
		return filepath.Join(home, ".local", "state", directory)
	}
	return ""
}

// RuntimeSocket returns the path of the agent's socket of this name in the runtime
// directory, or "" when XDG_RUNTIME_DIR is not set. The agent's own socket has the name
// AgentName; a [[socket]] table names another one.
func RuntimeSocket(name string) string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return socketIn(dir, name)
	}
	return ""
}

// AgentName is the name of the agent's own socket.
const AgentName = "agent"

// socketIn returns the path of a socket below a runtime directory.
func socketIn(runtimeDir, name string) string {
	return filepath.Join(runtimeDir, directory, name+".sock")
}

// StateSocket returns where setup lets an agent listen that has no runtime directory, or
// "" when there is no home directory. Other commands look for the agent there.
func StateSocket() string {
	if dir := StateDir(); dir != "" {
		return filepath.Join(dir, AgentName+".sock")
	}
	return ""
}

// UserSocket returns where the agent of this user listens by default, setup included, or
// "" when there is no such place. It takes the usual runtime directory when
// XDG_RUNTIME_DIR is not set.
func UserSocket() string {
	if path := RuntimeSocket(AgentName); path != "" {
		return path
	}
	dir := fmt.Sprintf("/run/user/%d", os.Geteuid())
	if _, err := os.Stat(dir); err != nil {
		return StateSocket()
	}
	return socketIn(dir, AgentName)
}

// ExpandHome replaces "~/" at the start of a path by the home directory.
func ExpandHome(path string) string {
	if rest, ok := strings.CutPrefix(path, "~/"); ok {
		return filepath.Join(os.Getenv("HOME"), rest)
	}
	return path
}
