package machine

import (
	"context"
	"testing"
)

// New boots a machine for a test, which fails where it cannot, and closes it at
// the test's end. The log of a failed test has the machine's journal.
func New(t testing.TB, config Config) *Machine {
	t.Helper()
	m, err := Boot(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() && m.leader != 0 {
			// The test's own context has ended.
			cmd := m.Command(context.Background(), "journalctl", "-q", "--no-pager", "-b", "-n", "40", "-p", "notice")
			out, _ := cmd.CombinedOutput()
			t.Logf("end of the journal of %s:\n%s", config.Name, out)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// Output runs a command in the machine, and fails the test with its error output
// where it fails.
func (m *Machine) Output(t testing.TB, args ...string) string {
	t.Helper()
	out, err := m.Run(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
