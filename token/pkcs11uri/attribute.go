package pkcs11uri

import (
	"strconv"
	"strings"
)

// An attribute is an attribute that RFC 7512 defines.
type attribute struct {
	name  string
	query bool
	// parse reads the value from the text into the field. Its errors are those of the
	// readers of values.
	parse func(u *URI, raw []byte) error
	// print returns the value for the text, and whether the URI has one. full is as in
	// URI.format.
	print func(u *URI, full bool) (string, bool)
}

// attributes are the attributes of RFC 7512 section 2.3, in the order of the printed
// text.
var attributes = []attribute{
	fixed("token", func(u *URI) **string { return &u.Token }),
	fixed("manufacturer", func(u *URI) **string { return &u.Manufacturer }),
	fixed("serial", func(u *URI) **string { return &u.Serial }),
	fixed("model", func(u *URI) **string { return &u.Model }),
	fixed("library-manufacturer", func(u *URI) **string { return &u.LibraryManufacturer }),
	{
		name: "library-version",
		parse: func(u *URI, raw []byte) (err error) {
			u.LibraryVersion, err = parseVersion(raw)
			return err
		},
		print: func(u *URI, _ bool) (string, bool) {
			if u.LibraryVersion == nil {
				return "", false
			}
			return u.LibraryVersion.String(), true
		},
	},
	fixed("library-description", func(u *URI) **string { return &u.LibraryDescription }),
	text("object", func(u *URI) **string { return &u.Object }),
	{
		name: "type",
		parse: func(u *URI, raw []byte) (err error) {
			u.Type, err = parseClass(raw)
			return err
		},
		print: func(u *URI, _ bool) (string, bool) { return string(u.Type), u.Type != "" },
	},
	{
		name: "id",
		parse: func(u *URI, raw []byte) (err error) {
			u.ID, err = decodeValue(raw, false)
			return err
		},
		print: func(u *URI, _ bool) (string, bool) {
			// Section 2.3: the id is not text, so it is percent-encoded as a whole.
			return FormatID(u.ID), u.ID != nil
		},
	},
	{
		name: "slot-id",
		parse: func(u *URI, raw []byte) (err error) {
			u.SlotID, err = parseSlotID(raw)
			return err
		},
		print: func(u *URI, _ bool) (string, bool) {
			if u.SlotID == nil {
				return "", false
			}
			return strconv.FormatUint(*u.SlotID, 10), true
		},
	},
	fixed("slot-manufacturer", func(u *URI) **string { return &u.SlotManufacturer }),
	fixed("slot-description", func(u *URI) **string { return &u.SlotDescription }),

	{
		name:  "pin-source",
		query: true,
		parse: func(u *URI, raw []byte) (err error) {
			u.PINSource, err = parsePINSource(raw)
			return err
		},
		print: func(u *URI, full bool) (string, bool) {
			switch {
			case u.PINSource == nil:
				return "", false
			case full:
				return escapeQuery(u.PINSource.text()), true
			default:
				return u.PINSource.String(), true
			}
		},
	},
	{
		name:  pinValue,
		query: true,
		parse: func(u *URI, raw []byte) (err error) {
			u.pin, err = parsePIN(raw)
			return err
		},
		print: func(*URI, bool) (string, bool) { return "", false },
	},
	{
		name:  "module-name",
		query: true,
		parse: func(u *URI, raw []byte) (err error) {
			u.ModuleName, err = decodeText(raw, true)
			return err
		},
		print: func(u *URI, _ bool) (string, bool) { return printQuery(u.ModuleName) },
	},
	{
		name:  "module-path",
		query: true,
		parse: func(u *URI, raw []byte) (err error) {
			u.ModulePath, err = decodePath(raw)
			return err
		},
		print: func(u *URI, _ bool) (string, bool) { return printQuery(u.ModulePath) },
	},
}

// fixed returns a path attribute whose value is a text of fixed width in PKCS#11. parse
// drops the padding.
func fixed(name string, field func(*URI) **string) attribute {
	a := text(name, field)
	parse := a.parse
	a.parse = func(u *URI, raw []byte) error {
		err := parse(u, raw)
		if value := *field(u); value != nil {
			*field(u) = new(strings.TrimRight(*value, Padding))
		}
		return err
	}
	return a
}

// text returns a path attribute whose value is text.
func text(name string, field func(*URI) **string) attribute {
	return attribute{
		name: name,
		parse: func(u *URI, raw []byte) (err error) {
			*field(u), err = decodeText(raw, false)
			return err
		},
		print: func(u *URI, _ bool) (string, bool) {
			value := *field(u)
			if value == nil {
				return "", false
			}
			return escapePath(*value), true
		},
	}
}

func printQuery(value *string) (string, bool) {
	if value == nil {
		return "", false
	}
	return escapeQuery(*value), true
}

func attributeNamed(name string) *attribute {
	for i := range attributes {
		if attributes[i].name == name {
			return &attributes[i]
		}
	}
	return nil
}

// String returns the canonical text without anything that may be secret:
//
//   - It omits the pin-value.
//   - It shows only the kind of a pin-source.
//   - It omits the values of vendor attributes in the path. One of them may be a mistyped
//     PIN attribute.
//   - It omits vendor attributes of the query. One of them may be the rest of a PIN whose
//     "&" was not encoded.
//
// A text without the pin-value still works when a person pastes it somewhere: the agent
// asks for the PIN. A placeholder for the pin-value would be tried as the PIN, and would
// cost a try. Parse refuses the placeholder of a pin-source, so the loss of a pin-source
// does not stay unnoticed.
func (u URI) String() string { return u.format(false) }

// format prints the URI. full includes the pin-source and the values of vendor
// attributes; only tests compare those.
func (u *URI) format(full bool) string {
	text := scheme + strings.Join(u.component(false, full), ";")
	if query := u.component(true, full); len(query) > 0 {
		text += "?" + strings.Join(query, "&")
	}
	return text
}

// component returns the attributes of the path or of the query.
func (u *URI) component(query, full bool) []string {
	var all []string
	for _, a := range attributes {
		if a.query == query {
			if value, ok := a.print(u, full); ok {
				all = append(all, a.name+"="+value)
			}
		}
	}
	switch {
	case query && full:
		for _, v := range u.queryVendor {
			all = append(all, *v.name+"="+escapeQuery(*v.value))
		}
	case full:
		for _, v := range u.pathVendor {
			all = append(all, *v.name+"="+escapePath(*v.value))
		}
	case !query:
		for _, v := range u.pathVendor {
			all = append(all, *v.name+"=...")
		}
	}
	return all
}

// text returns the text that parsePINSource reads.
func (s PINSource) text() string {
	switch s.Kind {
	case PINCommand:
		return commandPrefix + s.Command()
	case PINCredential:
		return credentialPrefix + s.Credential()
	}
	prefix := filePrefix
	if strings.HasPrefix(s.Path(), "//") {
		prefix += "//" // an empty host: otherwise the path would count as the host
	}
	return prefix + escape(s.Path(), func(c byte) bool {
		return isValueChar(c, false) || c == '/' || c == ';'
	})
}

func escapePath(value string) string {
	return escape(value, func(c byte) bool { return isValueChar(c, false) })
}

func escapeQuery(value string) string {
	return escape(value, func(c byte) bool { return isValueChar(c, true) })
}

// escape percent-encodes every byte of value that plain does not let through.
func escape(value string, plain func(byte) bool) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(value) {
		if c := value[i]; plain(c) {
			b.WriteByte(c)
		} else {
			b.WriteByte('%')
			b.WriteByte(digits[c>>4])
			b.WriteByte(digits[c&15])
		}
	}
	return b.String()
}
