package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"

	"p11-agent/cmd/p11-agent/advice"
	"p11-agent/cmd/p11-agent/backend"
	"p11-agent/cmd/p11-agent/config"
	"p11-agent/cmd/p11-agent/named"
	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/token"
	"p11-agent/token/pin"
	"p11-agent/token/pkcs11uri"
	"p11-agent/token/registry"
	"p11-agent/token/selection"
	"p11-agent/token/wellknown"
	"p11-agent/token/wire"
)

// findRegistry adds what is wrong with p11-kit's configuration.
func findRegistry(r *Group, c *config.File) {
	reg := registry.Load(registry.Options{Dirs: registry.DefaultDirs(os.LookupEnv, os.Geteuid()), Program: registry.Program})
	for _, w := range reg.Warnings {
		r.bad("module configuration: %v", w)
	}
	for _, m := range c.UnknownModules(reg) {
		r.warn("%s: [[module]] name = %q: there is no such module, so the table does nothing", c.Path(), m.Name).Next("%s", m.Hint)
	}
}

// findModules looks at each module. Modules that have not shown their tokens by now do not
// answer.
func findModules(r *Group, b *backend.Modules) {
	all := b.Store.Modules()
	for _, m := range all {
		switch {
		case m.Err != nil && advice.LacksTPM(m.Path):
			// It comes with a package that many have for another reason.
			r.warn("module %s (%s) finds no TPM on this machine", m.Name, m.Path).
				Next("switch the TPM on in the firmware, if there is one").
				Next("%s", advice.SwitchOff(m.Name))
		case m.Err != nil:
			r.bad("module %s (%s): %v", m.Name, m.Path, m.Err).Steps(advice.Module(m))
		case !b.Settled() && m.Library == "":
			r.bad("module %s (%s): it does not answer", m.Name, m.Path).
				Next("%s", advice.SwitchOff(m.Name))
		case m.Empty != "":
			r.warn("module %s (%s) shows no token; %s", m.Name, m.Path, m.Empty).
				Next("%s", advice.StartServer).Next("%s", advice.SwitchOff(m.Name))
		default:
			f := r.ok("module %s (%s): %s, %s", m.Name, m.Path, cmp.Or(m.Library, "works"), output.Count(len(m.Tokens), "token"))
			if len(m.Tokens) == 0 {
				f.Next("%s", advice.FirstToken(m))
			}
			if wellknown.KindOf(m.Path) == wellknown.Spy {
				r.warn("module %s prints each PIN that it is given: the agent keeps the PIN out of its log, but PKCS11SPY_OUTPUT writes it into a file", m.Name).
					Next("%s", advice.SwitchOff(m.Name))
			}
		}
		for _, reason := range m.LeftOut {
			r.warn("module %s: left out: %s", m.Name, reason).Next("p11-agent list -v  # shows what is used")
		}
	}
	for _, m := range b.Broken {
		r.bad("module %s is not started: %s", m.Name, m.Skip)
	}
	for _, m := range b.Skipped {
		if !m.Broken {
			r.detail("module %s is not started: %s", m.Name, m.Skip)
			continue
		}
		f := r.warn("module %s, of %s, is not started: %s", m.Name, strings.Join(m.Files, " and "), m.Skip)
		switch install := advice.InstallModule(m.Settings["module"].Value); {
		case m.Advice != "":
			f.Next("%s", m.Advice).Next("%s", advice.SwitchOff(m.Name))
		case install != "":
			f.Next("%s", install)
		case m.Path != "":
			f.Next("%s", advice.SwitchOff(m.Name))
		default:
			f.Next("install the package that brings %s, or remove %s", cmp.Or(m.Settings["module"].Value, m.Name), strings.Join(m.Files, " and "))
		}
	}
	if len(all) == 0 {
		r.bad("no PKCS#11 module is registered, so the agent can find no key").
			Next("for smart cards and security keys: %s", advice.Install("opensc-pkcs11", "opensc")).
			Next("for a module of your own, write into the configuration:\n[[module]]\npath = \"/path/to/module.so\"")
	}
}

// A Problem is a finding about something that does not work.
type Problem struct {
	Text string
	Next []string // the steps that help
}

// TokenProblems returns the problems of the tokens that modules show.
func TokenProblems(modules []token.ModuleStatus) (all []Problem) {
	r := new(Group)
	findTokens(r, modules)
	for _, f := range r.findings {
		if f.level == levelProblem {
			all = append(all, Problem{f.text, f.next})
		}
	}
	return all
}

func findTokens(r *Group, modules []token.ModuleStatus) {
	for _, m := range modules {
		for _, t := range m.Tokens {
			name := fmt.Sprintf("token %q (serial %s)", t.ID.Label, t.ID.Serial)
			if t.Reader != "" {
				name = fmt.Sprintf("token %q (serial %s, the one in reader %q)", t.ID.Label, t.ID.Serial, t.Reader)
			}
			for _, reason := range t.LeftOut {
				r.warn("%s: left out: %s", name, reason).Next("p11-agent list -v %s  # shows what is used", output.ShellWord(t.URI))
			}
			switch {
			case t.Shadowed != "":
				r.bad("%s is seen through the modules %s and %s, and is used through %s: switch one off with a [[module]] table",
					name, t.Shadowed, t.Module, t.Shadowed).Next("%s", advice.SwitchOff(t.Module))
			case t.Home != "":
				r.bad("%s belongs to module %s, and module %s shows it now: PINs of the configuration are not given to %s", name, t.Home, t.Module, t.Module).
					Next("see why module %s does not show the token: p11-agent list -v", t.Home).
					Next("or say that the token belongs to module %s, with a [[key]] table in the configuration:\n[[key]]\nuri = \"%s?module-name=%s\"", t.Module, t.URI, t.Module)
			case t.Tries == pin.TriesNone:
				r.bad("the PIN of %s is locked: unlock it with its PUK or SO PIN", name).Next("%s", advice.Unlock(m, t))
			case t.Tries == pin.TriesLast:
				r.bad("%s has one try left for its PIN: a wrong one locks it", name).
					Next("make sure that you know the PIN before you give it; the right PIN brings all tries back")
			case t.Tries == pin.TriesLow:
				r.warn("%s: %s. A wrong PIN was given since the last right one", name, t.Tries).
					Next("sign in with the right PIN once, which brings all tries back: ssh-add -T ~/.ssh/NAME.pub")
			case t.Flags&wire.CKFLoginRequired != 0 && t.Flags&wire.CKFUserPINInitialized == 0:
				r.bad("no PIN was ever set for %s", name).
					Next("pkcs11-tool --module %s --token-label %s --login --login-type so --init-pin", output.ShellWord(m.Path), output.ShellWord(t.ID.Label))
			case t.Flags&wire.CKFUserPINToBeChanged != 0:
				r.warn("%s wants a new PIN: the present PIN is the maker's, or has expired", name).
					Next("pkcs11-tool --module %s --token-label %s --login --change-pin", output.ShellWord(m.Path), output.ShellWord(t.ID.Label))
			default:
				f := r.ok("%s: %s", name, output.Count(len(t.Keys), "key"))
				if len(t.Keys) == 0 {
					f.Next("%s", advice.FirstKey(m, t))
				}
			}
		}
	}
}

// maxOffered is how many keys a server accepts by default: six tries (MaxAuthTries of
// sshd_config(5)), the last of which may be a password.
const maxOffered = 5

func findKeys(ctx context.Context, r *Group, conf *config.File, b *backend.Modules) {
	store := b.Store
	if conf.Keys != nil {
		for _, u := range *conf.Keys {
			findURI(ctx, r, store, "keys", u.URI)
		}
	}
	for _, k := range conf.KeyTables {
		if k.URI != nil {
			findURI(ctx, r, store, "[[key]]", k.URI.URI)
		}
	}
	offers := b.Offers(conf)
	first := make(map[*token.Key]*token.Key)
	present, shown := 0, 0 // identities
	for _, o := range offers {
		for _, k := range o.Present {
			first[k] = o.Present[0]
		}
		if len(o.Present) > 0 {
			present++
		}
		if o.Shown {
			shown++
		}
	}
	for _, k := range store.Keys() {
		switch f := first[k]; f {
		case k:
			r.ok("offers %v", k)
		case nil:
			_, reason := config.Offered(k, conf.Automatic(), "")
			r.detail("does not offer %v: %s", k, cmp.Or(reason, backend.Unreadable))
		default:
			r.ok("%v, through module %s, is the same key as %v, through module %s, which is used first", k, k.Module(), f, f.Module())
		}
	}
	if shown < len(offers) {
		r.warn("%s", status.FewShown(shown, len(offers))).
			Next("in the configuration: keys = [\"pkcs11:...\"], with the URIs of the keys that you use")
	}
	if conf.Keys == nil && present == 0 && len(store.Away()) == 0 {
		f := r.warn("there is no key that the agent could offer")
		for _, step := range advice.FirstSteps(store.Modules()) {
			f.Next("%s", step)
		}
	}
	if present > maxOffered {
		r.warn(`%d keys are offered, and many servers hang up after six with "Too many authentication failures": name the keys that you use`, present).
			Next("in the configuration: keys = [\"pkcs11:...\"], with URIs of p11-agent list").
			Next("or tell ssh which key to use: p11-agent export --ssh-config HOST 'pkcs11:...'")
	}
}

// findURI adds what a URI of the configuration selects. When it selects nothing, the steps
// name similar keys and tokens.
func findURI(ctx context.Context, r *Group, store *token.Store, where string, u *pkcs11uri.URI) {
	keys, err := store.Select(ctx, selection.New(u))
	sure := slices.ContainsFunc(keys, func(k *token.Key) bool { return k.Matches(u) })
	if err == nil && !sure && u.Object != nil && pkcs11uri.Nearest(*u.Object, labelsOf(keys)) != "" {
		err = fmt.Errorf("%w: no object has this label before a login", token.ErrNoMatch)
	}
	switch {
	case err == nil && !sure:
		r.ok("%s: %v may match %s: only a login shows which", where, u, output.Count(len(keys), "key"))
	case err != nil:
		f := r.bad("%s: %v: %v", where, u, err)
		if errors.Is(err, token.ErrNoMatch) {
			adviseURI(f, store, u)
		}
	default:
		r.ok("%s: %v matches %s", where, u, output.Count(len(keys), "key"))
	}
	if names := u.Ignored(); len(names) > 0 {
		r.bad("%s: %v: the query attributes %q mean nothing here", where, u, names)
	}
}

// labelsOf returns the labels of keys.
func labelsOf(keys []*token.Key) (labels []string) {
	for _, k := range keys {
		labels = append(labels, k.Label())
	}
	return labels
}

// adviseURI adds steps that name the token or key that the person may mean.
func adviseURI(f *finding, store *token.Store, u *pkcs11uri.URI) {
	meant, there := named.Suggest(store, u)
	for _, m := range meant {
		f.Next("%s", m)
	}
	f.Next("%s", there)
	if len(store.Keys()) > 0 {
		f.Next("p11-agent list  # shows the URIs of what is there")
	}
}

// findSources looks at the files that PINs come from.
func findSources(r *Group, conf *config.File) {
	for _, u := range conf.PINSources() {
		err := pin.CheckSource(u)
		if err == nil {
			r.detail("the PIN of %v comes from the configuration", u)
			continue
		}
		f := r.bad("%v: %v", u, err)
		if u.PINSource == nil || u.PINSource.Path() == "" {
			continue
		}
		file := u.PINSource.Path()
		st, serr := os.Stat(file)
		switch {
		case serr == nil && st.Mode().Perm()&0o077 != 0:
			f.Next("chmod 600 %s", output.ShellWord(file))
		case serr == nil && st.Size() > 0:
		default:
			f.Next("(umask 077; read -rs PIN; printf '%%s\\n' \"$PIN\" >%s)  # then type the PIN and Enter", output.ShellWord(file))
		}
	}
}

// findPinentry adds which program asks for PINs.
func findPinentry(r *Group, conf *config.File) {
	name := cmp.Or(conf.Pinentry.Program, "pinentry")
	path, err := exec.LookPath(name)
	askpass := os.Getenv("SSH_ASKPASS")
	switch {
	case err == nil:
		r.ok("PINs are asked for by %s", path)
	case askpass != "":
		r.ok("PINs are asked for by SSH_ASKPASS, %s: there is no %s", askpass, name)
	default:
		r.bad("no PIN can be asked for: there is no %s: install one (pinentry-curses, pinentry-gnome3), or set pinentry.program", strings.TrimSpace(name)).
			Next("%s", advice.Install("pinentry-curses", "pinentry"))
	}
}
