// Command bench measures what the injector and the provisioner cost, next to what one
// would do without them, in one run on one machine. Every program is the real one; the
// machines are systemd-nspawn's, the cache disks loop devices.
//
//	bench [-run REGEXP] [-rounds N] [-list] [-json FILE]
//
// It prints a table below what machine and versions it is of, writes the same beside the
// JSON, with the ending .txt, and the figures as JSON. Everything is measured once in each
// round, one thing after the other, so that other load on the machine slows all of them
// equally; the table has the medians, and ratios are those of values of the same round.
// -run picks benchmarks by name.
//
// Cache disks and images are made once and kept in the cache folder, for which
// SELKIES_BUILD_CACHE names another place.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// benchmark is measured once in each round.
type benchmark interface {
	// prepare makes what is not to be measured.
	prepare(ctx context.Context) error
	round(ctx context.Context) error
	figures() []figure
}

// benchmarks in the order of the table.
var benchmarks = []struct {
	name, about string
	new         func(*session) benchmark
}{
	{"containerd-100", "containerd, 10 images of 11 layers", func(s *session) benchmark { return newLayers(s, 10, true) }},
	{"containerd-600", "containerd, 60 images of 11 layers", func(s *session) benchmark { return newLayers(s, 60, true) }},
	{"containerd-2000", "containerd, 200 images of 11 layers", func(s *session) benchmark { return newLayers(s, 200, false) }},
	{"docker-600", "Docker's overlay2 store, 60 images of 11 layers", func(s *session) benchmark { return newStore(s, 60) }},
	{"desktop-containerd", "containerd, the image of a desktop", func(s *session) benchmark { return newDesktop(s, containerdPeers) }},
	{"desktop-docker", "Docker, the image of a desktop", func(s *session) benchmark { return newDesktop(s, dockerPeers) }},
	{"first-read", "containerd, the first start of a program on a network disk", newFirstRead},
	{"packer-600", "packer build, 60 images of 11 layers", func(s *session) benchmark { return newBuild(s, 60) }},
	{"verify-desktop", "verify of the disk with the images of a desktop, in the page cache", newVerification},
	{"agent-2000", "the node agent's memory with 200 images of 11 layers", func(s *session) benchmark { return newAgent(s, 200) }},
	{"node-boot", "a node of a cluster, from its boot until the application of a desktop runs", newNodeBoot},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	pick := flag.String("run", "", "run the benchmarks whose name matches the `regexp` only")
	rounds := flag.Int("rounds", 5, "how often each thing is measured")
	list := flag.Bool("list", false, "list the benchmarks and measure nothing")
	file := flag.String("json", "build/bench.json", "`file` to write the figures to")
	flag.Parse()
	wanted, err := regexp.Compile(*pick)
	if err != nil {
		return fmt.Errorf("-run %q: %w", *pick, err)
	}
	if *list {
		for _, b := range benchmarks {
			fmt.Printf("%-20s %s\n", b.name, b.about)
		}
		return nil
	}
	return measure(ctx, wanted, *rounds, *file)
}

// section is the benchmark of one name.
type section struct {
	name, about string
	benchmark
}

func measure(ctx context.Context, wanted *regexp.Regexp, rounds int, file string) (err error) {
	s, err := newSession(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	began := time.Now()
	var sections []section
	for _, b := range benchmarks {
		if !wanted.MatchString(b.name) {
			continue
		}
		sections = append(sections, section{b.name, b.about, b.new(s)})
	}
	if len(sections) == 0 {
		return fmt.Errorf("no benchmark matches %q: -list names them", wanted)
	}
	for _, b := range sections {
		s.progress("preparing %s", b.name)
		if err := b.prepare(ctx); err != nil {
			return fmt.Errorf("preparing %s: %w", b.name, err)
		}
	}
	for n := range rounds {
		for _, b := range sections {
			s.progress("round %d of %d: %s", n+1, rounds, b.name)
			if err := b.round(ctx); err != nil {
				return fmt.Errorf("measuring %s: %w", b.name, err)
			}
		}
	}
	head, err := header(ctx)
	if err != nil {
		return err
	}
	figures := collect(sections)
	var table strings.Builder
	fmt.Fprintf(&table, "%s%d rounds in %s\n\n", head, rounds, time.Since(began).Round(time.Second))
	printTable(&table, figures)
	fmt.Print("\n", table.String())
	if err := writeJSON(file, figures); err != nil {
		return err
	}
	return os.WriteFile(strings.TrimSuffix(file, ".json")+".txt", []byte(table.String()), 0o644)
}

// collect is all that was measured, by section.
func collect(sections []section) []group {
	var groups []group
	var sizes []*layers
	for _, b := range sections {
		groups = append(groups, group{b.name + ": " + b.about, b.name, b.figures()})
		if l, ok := b.benchmark.(*layers); ok {
			sizes = append(sizes, l)
		}
	}
	if len(sizes) > 1 {
		groups = append(groups, group{"growth", "growth", growth(sizes)})
	}
	return groups
}
