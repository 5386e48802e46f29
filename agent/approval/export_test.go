package approval

// Limits for tests outside of the package.
const (
	FirstPause = firstPause
	MaxNos     = maxNos
	MaxOpen    = maxOpen
)
