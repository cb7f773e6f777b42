//go:build e2e

package pipeline_test

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/api/cloudbuild/v1"
	"sigs.k8s.io/yaml"
)

// examples are the template and all that runs it, as users have them.
const examples = "../../example/gke"

// TestCloudBuildFiles reads the files with the types of the Cloud Build API: what is
// not a field of it is an error. It looks for what the API refuses besides.
func TestCloudBuildFiles(t *testing.T) {
	files, err := filepath.Glob("../../example/*/cloudbuild*.yaml")
	if err != nil || len(files) != 2 {
		t.Fatalf("%d files: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			b := readCloudBuild(t, file)
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			// All but those that Cloud Build itself has are declared, and all are used.
			used := map[string]bool{}
			for _, m := range regexp.MustCompile(`\$\{?(_[A-Z0-9_]+)`).FindAllStringSubmatch(string(data), -1) {
				used[m[1]] = true
			}
			declared := slices.Sorted(maps.Keys(b.Substitutions))
			if u := slices.Sorted(maps.Keys(used)); !slices.Equal(u, declared) {
				t.Errorf("declared are %q, used %q", declared, u)
			}
			seconds := regexp.MustCompile(`^[0-9]+s$`)
			if !seconds.MatchString(b.Timeout) {
				t.Errorf("timeout is %q", b.Timeout)
			}
			if len(b.Steps) == 0 {
				t.Error("it has no steps")
			}
			ids := map[string]bool{}
			for i, s := range b.Steps {
				if s.Name == "" || ids[s.Id] {
					t.Errorf("step %d has the name %q and the ID %q", i, s.Name, s.Id)
				}
				ids[s.Id] = true
				for _, e := range s.Env {
					if !strings.Contains(e, "=") {
						t.Errorf("step %s: env has %q", s.Id, e)
					}
				}
			}
		})
	}
}

// TestRecipeSubstitutions has the substitutions of the original recipe.
func TestRecipeSubstitutions(t *testing.T) {
	b := readCloudBuild(t, filepath.Join(examples, "cloudbuild-install-cronjob.yaml"))
	for _, name := range []string{"_CRONJOB_REGION", "_IMAGE_BUILD_REGION", "_IMAGE_BUILD_ZONE", "_DISK_SIZE_GB", "_EXCLUDE_REGIONS",
		"_PROVISION_MACHINE_TYPE", "_IMAGE_BUILD_SCHEDULE"} {
		if _, ok := b.Substitutions[name]; !ok {
			t.Errorf("%s is not among the substitutions", name)
		}
	}
}

func readCloudBuild(t *testing.T, file string) *cloudbuild.Build {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b := new(cloudbuild.Build)
	if err := yaml.UnmarshalStrict(data, b); err != nil {
		t.Fatal(err)
	}
	return b
}

// stepOf is a step with its substitutions made, as Cloud Build makes them: those given,
// the defaults, and those that every build has.
func stepOf(t *testing.T, b *cloudbuild.Build, id string, given map[string]string) *cloudbuild.BuildStep {
	t.Helper()
	all := map[string]string{"PROJECT_ID": project, "BUILD_ID": "0b1c"}
	maps.Copy(all, b.Substitutions)
	maps.Copy(all, given)
	var expand func(s string) string
	expand = func(s string) string {
		return os.Expand(s, func(name string) string {
			if name == "$" { // $$
				return "$"
			}
			value, ok := all[name]
			if !ok {
				t.Errorf("there is no substitution for %s", name)
			}
			return expand(value)
		})
	}
	i := slices.IndexFunc(b.Steps, func(s *cloudbuild.BuildStep) bool { return s.Id == id })
	if i < 0 {
		t.Fatalf("there is no step %s", id)
	}
	step := *b.Steps[i]
	step.Name = expand(step.Name)
	step.Args, step.Env = slices.Clone(step.Args), slices.Clone(step.Env)
	for _, list := range [][]string{step.Args, step.Env} {
		for i := range list {
			list[i] = expand(list[i])
		}
	}
	return &step
}

// installed is a copy of the examples in which the steps of Cloud Build have left what
// they leave for the CronJob.
func installed(t *testing.T, given map[string]string) string {
	t.Helper()
	top := t.TempDir()
	step := stepOf(t, readCloudBuild(t, filepath.Join(examples, "cloudbuild-install-cronjob.yaml")), "settings", given)
	dir := filepath.Join(top, step.Dir)
	if err := os.CopyFS(dir, os.DirFS(examples)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), step.Entrypoint, step.Args...)
	cmd.Dir, cmd.Env = dir, append([]string{"PATH=" + os.Getenv("PATH"), "HOME=/builder/home"}, step.Env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("step settings: %v\n%s", err, out)
	}
	return dir
}

// variablesOf are the variables of a Packer template that an environment sets, and the
// errors in it: Packer itself passes over variables that the template lacks.
func variablesOf(t *testing.T, template string, env []string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(template)
	if err != nil {
		t.Fatal(err)
	}
	set := map[string]string{}
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		name, ok := strings.CutPrefix(name, "PKR_VAR_")
		if !ok {
			continue
		}
		if !strings.Contains(string(data), fmt.Sprintf("\nvariable %q {\n", name)) {
			t.Errorf("the template has no variable %s", name)
		}
		set[name] = value
	}
	return set
}

// TestCloudBuildVariables has Packer take the variables of the build's file.
func TestCloudBuildVariables(t *testing.T) {
	step := stepOf(t, readCloudBuild(t, filepath.Join(examples, "cloudbuild.yaml")), "build", nil)
	if len(variablesOf(t, filepath.Join(examples, "image-cache.pkr.hcl"), step.Env)) == 0 {
		t.Error("the step sets no variable")
	}
	validate(t, "../..", step.Args, step.Env)
}

// validate has Packer validate what a build with these arguments would run.
func validate(t *testing.T, dir string, args, env []string) {
	t.Helper()
	if args[0] != "build" {
		t.Fatalf("Packer is to run %q", args)
	}
	template := args[len(args)-1]
	cmd := packerCommand(t.Context(), "validate", template)
	cmd.Dir, cmd.Env = dir, append(cmd.Env, env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("packer validate: %v\n%s", err, out)
	}
}
