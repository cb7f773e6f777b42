package agent

import (
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestEjected follows the note of what was ejected: one eject that succeeds, another that
// is refused, an inject by hand, and the agent's next start.
func TestEjected(t *testing.T) {
	a := &Agent{Config: Config{HostRoot: t.TempDir()}}
	one, other, third := digest.FromString("one"), digest.FromString("other"), digest.FromString("third")
	expect := func(when string, want ...digest.Digest) {
		t.Helper()
		ejected := map[digest.Digest]bool{}
		for _, id := range want {
			ejected[id] = true
		}
		for _, id := range []digest.Digest{one, other, third} {
			if got := a.wasEjected(id); got != ejected[id] {
				t.Errorf("%s: generation %s ejected is %v", when, id, got)
			}
		}
	}
	note := func(ids ...digest.Digest) (undo func() error) {
		t.Helper()
		undo, err := NoteEjected(a.HostRoot, ids)
		if err != nil {
			t.Fatal(err)
		}
		return undo
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	expect("at first")
	note(one)
	undo := note(one, other)
	expect("after two ejects", one, other)
	must(undo())
	expect("the second was refused", one)
	note(third)
	must(ForgetEjected(a.HostRoot, third))
	must(ForgetEjected(a.HostRoot, other))
	expect("after an inject", one)
	must(forgetEjected(a.HostRoot))
	expect("after a start")
	must(forgetEjected(a.HostRoot))
}
