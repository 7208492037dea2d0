{{- define "coxswain.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "coxswain.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "coxswain.labels" -}}
{{ include "coxswain.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* The server's configuration file. */}}
{{- define "coxswain.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $auth := default dict $config.auth -}}
{{- range $name, $_ := omit $auth "api_keys" -}}
{{- fail (printf "config.auth.%s: keys belong in `keys`, which makes a Secret of them" $name) -}}
{{- end -}}
{{- range $entry := $auth.api_keys -}}
{{- if kindIs "string" $entry -}}
{{- fail "config.auth.api_keys: keys without limits belong in `keys.api`" -}}
{{- end -}}
{{- if not (hasPrefix "sha256:" $entry.key) -}}
{{- fail "config.auth.api_keys: give each key as sha256:… (printf %s KEY | sha256sum)" -}}
{{- end -}}
{{- if and (or (hasKey $entry "profiles") (hasKey $entry "adapters")) (not $.Values.metrics.key) -}}
{{- fail "metrics.key: must be true where config.auth.api_keys limits a key: /metrics has all names" -}}
{{- end -}}
{{- end -}}
{{- if .Values.admin.port -}}
{{- $_ := set $config "server" (merge (dict "admin_port" (int .Values.admin.port)) (default dict $config.server)) -}}
{{- end -}}
{{- if hasKey $config "adapters" -}}
{{- if not .Values.registry.url -}}
{{- fail "registry.url: replicas with adapters must share a durable Redis" -}}
{{- end -}}
{{- $_ := set $config "registry" (merge (dict "url" .Values.registry.url) (default dict $config.registry)) -}}
{{- $_ := set $config.adapters "store" (default "/var/lib/coxswain/adapters" $config.adapters.store) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Seconds from SIGTERM until requests are cut off: the file's, or the server's defaults; rounded up. */}}
{{- define "coxswain.drain" -}}
{{- $notice := dig "server" "drain_notice_s" 0 .Values.config | float64 -}}
{{- $drain := dig "server" "drain_timeout_s" 30 .Values.config | float64 -}}
{{- ceil (addf $notice $drain) | int -}}
{{- end -}}

{{/* A hash of the keys, so that changed ones restart the replicas. */}}
{{- define "coxswain.keysChecksum" -}}
{{- if .Values.keys.existingSecret -}}
{{- $found := lookup "v1" "Secret" .Release.Namespace .Values.keys.existingSecret -}}
{{- dig "data" dict ($found | default dict) | toJson | sha256sum -}}
{{- else -}}
{{- toJson .Values.keys | sha256sum -}}
{{- end -}}
{{- end -}}

{{- define "coxswain.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "coxswain.name" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "coxswain.keys" -}}
{{- .Values.keys.existingSecret | default (printf "%s-keys" (include "coxswain.name" .)) -}}
{{- end -}}
