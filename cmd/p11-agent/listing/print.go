package listing

import (
	"cmp"
	"fmt"
	"io"
	"strconv"
	"strings"

	"p11-agent/cmd/p11-agent/output"
	"p11-agent/cmd/p11-agent/status"
	"p11-agent/pinentry/plain"
)

// PrintPublic prints lines for authorized_keys.
func PrintPublic(out io.Writer, l Listing) error {
	for _, t := range l.Tokens {
		for _, k := range t.Keys {
			// A key that the command line names is printed, even if the agent does not offer it.
			if !k.Offered && !l.named || t.Shadowed != "" {
				continue
			}
			if _, behind := k.first(); behind && !l.named {
				continue
			}
			if _, err := fmt.Fprintf(out, "%s %s\n", k.PublicKey, cmp.Or(k.Name, k.comment)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Print prints the listing for a person: tokens and keys on out, modules on stderr.
func Print(out, stderr io.Writer, l Listing, verbose bool) error {
	var b strings.Builder
	for _, t := range l.Tokens {
		fmt.Fprintf(&b, "%s\n", output.Paint(out, output.Strong, t.URI))
		fmt.Fprintf(&b, "    token %s, %s %s, module %s", strconv.Quote(t.Label), plain.Line(t.Manufacturer), plain.Line(t.Model), t.Module)
		switch {
		case !t.Present:
			fmt.Fprintf(&b, ", %s, last seen %s", output.Paint(out, output.Caution, "NOT THERE"), t.LastSeen.Local().Format("2006-01-02 15:04"))
		case t.PIN == status.PINLocked:
			b.WriteString(", " + output.Paint(out, output.Bad, "PIN LOCKED"))
		case t.PIN == status.PINLast:
			b.WriteString(", " + output.Paint(out, output.Bad, "ONE PIN TRY LEFT"))
		case t.PIN == status.PINLow:
			b.WriteString(", " + output.Paint(out, output.Caution, "fewer PIN tries left"))
		case !t.LoginNeeded:
			b.WriteString(", no PIN needed")
		}
		if t.Reader != "" {
			fmt.Fprintf(&b, ", the one in reader %s", strconv.Quote(t.Reader))
		}
		if t.Shadowed != "" {
			fmt.Fprintf(&b, ", used through module %s", t.Shadowed)
		}
		if t.Home != "" {
			b.WriteString(", " + output.Paint(out, output.Caution, "BELONGS TO MODULE "+t.Home))
		}
		b.WriteString("\n")
		if verbose {
			for _, reason := range t.LeftOut {
				fmt.Fprintf(&b, "    left out: %s\n", reason)
			}
		}
		for _, k := range t.Keys {
			kind := k.Type
			if k.Bits > 0 {
				kind = fmt.Sprintf("%s (%d bits)", kind, k.Bits)
			}
			fmt.Fprintf(&b, "  %s\n    %s %s", k.URI, kind, k.Fingerprint)
			if n := cmp.Or(k.Name, k.Label); n != "" {
				fmt.Fprintf(&b, " %s", strconv.Quote(n))
			}
			b.WriteString("\n")
			switch {
			case !k.Offered:
				fmt.Fprintf(&b, "    %s: %s\n", output.Paint(out, output.Caution, "not offered"), plain.Line(k.Reason))
			case !t.Present:
				b.WriteString("    can sign once its token is inserted\n")
			case k.EachUse:
				b.WriteString("    " + output.Paint(out, output.Good, "can sign") + ", and asks for the PIN each time\n")
			default:
				b.WriteString("    " + output.Paint(out, output.Good, "can sign") + "\n")
			}
			if verbose && k.NotShown {
				b.WriteString("    clients are not shown it: there are too many keys\n")
			}
			if h, behind := k.first(); behind {
				fmt.Fprintf(&b, "    same key as %s (module %s), which is used first\n", h.URI, h.Module)
			} else {
				for _, h := range k.Homes {
					fmt.Fprintf(&b, "    used before the same key %s (module %s)\n", h.URI, h.Module)
				}
			}
		}
		if len(t.Keys) == 0 {
			b.WriteString("    no key that can be used with SSH\n")
		}
	}
	_, err := io.WriteString(out, b.String())
	if l.Empty() {
		fmt.Fprintln(stderr, "no token is present")
	}
	for _, m := range l.Modules {
		if m.Error != "" || m.Empty != "" || m.Restarts > 0 || verbose {
			fmt.Fprintf(stderr, "module %s: %s\n", m.Name, plain.Line(m.state()))
			output.Steps(stderr, "  next: ", m.Next)
		}
		if verbose {
			for _, reason := range m.LeftOut {
				fmt.Fprintf(stderr, "module %s: left out: %s\n", m.Name, reason)
			}
		}
	}
	if verbose && l.Shown < l.Offered {
		fmt.Fprintln(stderr, status.FewShown(l.Shown, l.Offered))
	}
	return err
}
