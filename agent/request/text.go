package request

const (
	// MaxField bounds what is kept of one text that came from outside, in bytes,
	// and MaxReason what is of an error.
	MaxField, MaxReason = 256, 1024
)
