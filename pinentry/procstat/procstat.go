// Package procstat reads /proc/PID/stat (proc_pid_stat(5)). It keeps no data. Any goroutine
// may call its functions. The kernel uses the numbers of processes again. So the caller
// makes sure that a number still belongs to the right process.
package procstat

import (
	"bytes"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Tick is the unit of times in /proc, the same on all Linux systems (USER_HZ).
const Tick = 10 * time.Millisecond

// A Stat has fields of /proc/PID/stat.
type Stat struct {
	Name       []byte // the process gives itself its name (comm): up to 15 bytes of any kind
	State      byte   // 'R' runs, 'S' and 'D' sleep, 'T' is stopped, 'Z' has ended
	Parent     int
	Group      int           // process group
	Session    int           // the number of the process that leads the session
	TTY        uint32        // controlling terminal, with the bits of tty_nr; 0: none
	Foreground int           // the group in the foreground of the terminal; -1 without a terminal
	CPU        time.Duration // processor time of all threads, also of those that have ended
	Start      uint64        // in ticks after boot
}

// scratch has room for 52 numbers of up to 20 digits and a name.
var scratch = sync.Pool{New: func() any { return new([2048]byte) }}

// Of reads the Stat of a process. ok is false when there is no such process, or /proc does not
// show it.
func Of(pid int) (s Stat, ok bool) { return read("/proc/" + strconv.Itoa(pid) + "/stat") }

// OfThread reads the Stat of a thread of this process.
func OfThread(tid int) (s Stat, ok bool) {
	return read("/proc/self/task/" + strconv.Itoa(tid) + "/stat")
}

func read(path string) (Stat, bool) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Stat{}, false
	}
	defer unix.Close(fd) //nolint:errcheck // it was only read
	buf := scratch.Get().(*[2048]byte)
	defer scratch.Put(buf)
	n, err := unix.Read(fd, buf[:])
	if err != nil {
		return Stat{}, false
	}
	return Parse(buf[:n])
}

// Parse reads the contents of /proc/PID/stat. The name in the second field may hold blanks,
// line ends and brackets, but no bracket comes after it. If a field is missing or is not a
// number, ok is false.
func Parse(b []byte) (s Stat, ok bool) {
	from, to := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if from < 0 || to < from {
		return Stat{}, false
	}
	s.Name = bytes.Clone(b[from+1 : to])
	number := 2
	for field := range bytes.FieldsSeq(b[to+1:]) {
		var n int64
		var err error
		switch number++; number {
		case 3:
			s.State = field[0]
		case 4, 5, 6, 7, 8:
			n, err = strconv.ParseInt(string(field), 10, 32)
		case 14, 15:
			n, err = strconv.ParseInt(string(field), 10, 64)
		case 22:
			s.Start, err = strconv.ParseUint(string(field), 10, 64)
		}
		if err != nil {
			return Stat{}, false
		}
		switch number {
		case 4:
			s.Parent = int(n)
		case 5:
			s.Group = int(n)
		case 6:
			s.Session = int(n)
		case 7:
			s.TTY = uint32(n) // printed as a number with a sign
		case 8:
			s.Foreground = int(n)
		case 14, 15: // in user mode, and in the kernel
			s.CPU += time.Duration(n) * Tick
		case 22:
			return s, s.Parent >= 0
		}
	}
	return Stat{}, false
}

// Started returns when the process started, within some seconds: the kernel gives the time of
// boot in seconds (btime of proc_stat(5)), and the clock may have been set since.
func (s Stat) Started() (at time.Time, ok bool) {
	all, err := os.ReadFile("/proc/stat")
	if err != nil {
		return time.Time{}, false
	}
	_, after, ok := bytes.Cut(all, []byte("\nbtime "))
	line, _, _ := bytes.Cut(after, []byte("\n"))
	boot, err := strconv.ParseInt(string(line), 10, 64)
	if !ok || err != nil {
		return time.Time{}, false
	}
	return time.Unix(boot+int64(s.Start)/100, 0), true
}
