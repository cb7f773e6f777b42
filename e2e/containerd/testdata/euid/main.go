// Command euid fails unless its effective user ID is root's. As root with a program
// as its argument it runs that as user 1000 instead: together they show whether a
// set-user-ID bit works, without output, which ctr may lose on a busy machine.
package main

import (
	"fmt"
	"os"
	"syscall"
)

func main() {
	if len(os.Args) == 1 {
		if id := os.Geteuid(); id != 0 {
			fmt.Fprintln(os.Stderr, "effective user ID is", id)
			os.Exit(1)
		}
		return
	}
	if err := syscall.Setuid(1000); err != nil {
		panic(err)
	}
	panic(syscall.Exec(os.Args[1], os.Args[1:], nil))
}
