package wellknown

import (
	"bufio"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// SoftHSMSystemConfig is the configuration file of SoftHSM for all users, as Debian has it.
const SoftHSMSystemConfig = "/etc/softhsm/softhsm2.conf"

// SoftHSMUserConfig returns the path of a user's configuration file of SoftHSM.
func SoftHSMUserConfig(home string) string {
	return filepath.Join(home, ".config/softhsm2/softhsm2.conf")
}

// SoftHSMConfig returns the path of the configuration file that SoftHSM reads, for the
// values of the variables SOFTHSM2_CONF and HOME (SoftHSM, SimpleConfigLoader.cpp). When
// SoftHSM can read none, it returns SoftHSMSystemConfig.
func SoftHSMConfig(variable, home string) string {
	if variable != "" {
		return variable
	}
	// The last is the place of other distributions (configure --sysconfdir).
	for _, file := range []string{SoftHSMUserConfig(home), SoftHSMSystemConfig, "/etc/softhsm2.conf"} {
		if f, err := open(file); err == nil {
			_ = f.Close()
			return file
		}
	}
	return SoftHSMSystemConfig
}

// SoftHSMTokens returns the directory of tokens that a configuration file of SoftHSM names,
// or "".
func SoftHSMTokens(config string) (string, error) {
	f, err := open(config)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return tokenDir(f), nil
}

// open opens a file, and does not wait when it is a pipe.
func open(file string) (*os.File, error) {
	return os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
}

// maxConfig bounds what is read of a configuration, in bytes.
const maxConfig = 64 << 10

// tokenDir reads directories.tokendir. The last line counts, as in SimpleConfigLoader.cpp.
func tokenDir(r io.Reader) (dir string) {
	lines := bufio.NewScanner(io.LimitReader(r, maxConfig))
	for lines.Scan() {
		line, _, _ := strings.Cut(lines.Text(), "#")
		name, value, _ := strings.Cut(line, "=")
		if strings.TrimSpace(name) == "directories.tokendir" {
			dir = strings.TrimSpace(value)
		}
	}
	return dir
}

// SoftHSMModule returns the path of SoftHSM's module, from the directories where
// distributions put it. The error is os.ErrNotExist when it is in none of them.
func SoftHSMModule() (string, error) {
	for _, dir := range []string{
		"/usr/lib/softhsm", "/usr/lib/*/softhsm", "/usr/lib64/softhsm", "/usr/lib*/pkcs11", "/usr/lib/*/pkcs11", "/usr/lib*",
		"/usr/local/lib/softhsm",
	} {
		// Glob fails on malformed patterns only, and these are constants.
		if files, _ := filepath.Glob(filepath.Join(dir, "libsofthsm2.so")); len(files) > 0 {
			return files[0], nil
		}
	}
	return "", os.ErrNotExist
}
