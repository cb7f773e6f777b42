// Command euid prints its effective user ID. As root with a program as its
// argument it runs that as user 1000 instead: together they show whether a
// set-user-ID bit works.
package main

import (
	"fmt"
	"os"
	"syscall"
)

func main() {
	if len(os.Args) == 1 {
		fmt.Println(os.Geteuid())
		return
	}
	if err := syscall.Setuid(1000); err != nil {
		panic(err)
	}
	panic(syscall.Exec(os.Args[1], os.Args[1:], nil))
}
