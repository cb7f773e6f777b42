// Command check fails if the release in a directory, such as build/dist, is not complete.
package main

import (
	"fmt"
	"os"

	"github.com/selkies-project/packer-plugin-selkies/e2e/release"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: check DIRECTORY")
		os.Exit(2)
	}
	if err := release.Check(os.Args[1], release.All); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
