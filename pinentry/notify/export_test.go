package notify

import "p11-agent/agent/peer/proctest"

// Show is a method that tests find in the stacks of goroutines.
var Show = (*Notifier).show

// BubbleMethods returns how the names of the methods of a bubble begin in a stack.
func BubbleMethods() string { return proctest.MethodsOf[bubble]() }
