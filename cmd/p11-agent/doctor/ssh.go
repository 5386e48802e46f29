package doctor

import (
	"bytes"
	"errors"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/crypto/ssh"
	sshagent "golang.org/x/crypto/ssh/agent"

	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/files"
	"p11-agent/cmd/p11-agent/paths"
	"p11-agent/cmd/p11-agent/probe"
)

// The versions of OpenSSH in which something useful appeared.
var (
	versionBind   = [2]int{8, 9} // session-bind@openssh.com, which names the host
	versionSign   = [2]int{8, 1} // ssh-keygen -Y
	openSSHNumber = regexp.MustCompile(`OpenSSH_(?:for_Windows_)?([0-9]{1,3})\.([0-9]{1,3})`)
)

func findSSH(r *Group, s probe.SSH, keys []*sshagent.Key) {
	if s.Version == "" {
		if errors.Is(s.Err, exec.ErrNotFound) {
			r.warn("there is no ssh here").Next("%s", advice.Install("openssh-client", "openssh-clients"))
		} else {
			r.bad("ssh -V: %v", s.Err)
		}
		return
	}
	m := openSSHNumber.FindStringSubmatch(s.Version)
	switch {
	case m == nil:
		r.detail("ssh is %s, which this program does not know", s.Version)
	default:
		major, _ := strconv.Atoi(m[1])
		minor, _ := strconv.Atoi(m[2])
		has := [2]int{major, minor}
		switch {
		case slices.Compare(has[:], versionSign[:]) < 0:
			r.warn("%s is old: it cannot sign git commits with SSH keys (8.1 can), nor tell the agent which host a signature is for (8.9 can)", m[0]).
				Next("upgrade OpenSSH; logins work as they are, keys with destinations (ssh-add -h) do not")
		case slices.Compare(has[:], versionBind[:]) < 0:
			r.warn("%s does not tell the agent which host a signature is for (8.9 does)", m[0]).
				Next("upgrade OpenSSH; logins work as they are, keys with destinations (ssh-add -h) do not, and prompts name no host")
		default:
			r.ok("%s", m[0])
		}
	}
	if s.Err != nil {
		f := r.bad("%v", s.Err)
		if strings.Contains(s.Err.Error(), "environment expansion") {
			f.Next("in ~/.ssh/config, write %s: a variable that is not set makes ssh refuse the whole file", paths.IdentityAgent(paths.UserSocket()))
		} else {
			f.Next("ssh -G %s  # names the file and the line, or hangs where ssh hangs", probe.AnyHost)
		}
		return
	}
	if s.Provider != "" && s.Provider != "none" {
		r.warn("ssh loads the module %s by itself (PKCS11Provider in its configuration), and asks for its PIN besides the agent", s.Provider).
			Next("take PKCS11Provider out of ~/.ssh/config or /etc/ssh/ssh_config")
	}
	if s.Only && len(keys) > 0 && !anyOfFiles(keys, s.Files) {
		r.warn("ssh offers only the keys of its IdentityFile lines (IdentitiesOnly yes), and none of those is in the agent").
			Next("p11-agent export --ssh-config  # prints the lines that name them")
	}
}

// anyOfFiles tells whether one of the files has the public key of one of the keys.
func anyOfFiles(keys []*sshagent.Key, names []string) bool {
	for _, file := range names {
		file = paths.ExpandHome(file)
		for _, name := range []string{file, file + ".pub"} {
			b, err := files.ReadSmall(name)
			if err != nil {
				continue
			}
			pub, _, _, _, err := ssh.ParseAuthorizedKey(b)
			if err == nil && slices.ContainsFunc(keys, func(k *sshagent.Key) bool { return bytes.Equal(k.Blob, pub.Marshal()) }) {
				return true
			}
		}
	}
	return false
}
